"""What a person sees of a run: the bar on a terminal, the lines in a file."""

import io
import logging
import subprocess
import sys
import unittest
from unittest import mock

from mingpt.checkpoint import wrapped
from mingpt.progress import Progress
from mingpt.trainer import Trainer
from tests.common import ROOT, tiny_gpt
from tests.test_trainer import config, tokens


class Terminal(io.StringIO):
    """A standard error stream that says it is a terminal."""

    def isatty(self):
        return True


class TestProgress(unittest.TestCase):
    def lines(self, seconds_each, iterations=5, total=5):
        """The lines that are logged when each iteration takes so many seconds."""
        clock = mock.Mock(side_effect=[seconds_each * i for i in range(iterations + 1)])
        with (
            mock.patch("time.monotonic", clock),
            mock.patch("sys.stderr", io.StringIO()),
            self.assertLogs("mingpt", logging.INFO) as logs,
            Progress("run", total) as shown,
        ):
            logging.getLogger("mingpt").info("it begins")
            for i in range(iterations):
                shown.update({"reward": i / 10})
        return [record.getMessage() for record in logs.records][1:]

    def test_into_a_file_a_line_every_half_minute(self):
        self.assertEqual(len(self.lines(seconds_each=1)), 0)
        self.assertEqual(len(self.lines(seconds_each=10)), 1)
        self.assertEqual(len(self.lines(seconds_each=30)), 5)

    def test_a_line_says_how_far_the_run_is_and_how_long_it_takes(self):
        lines = self.lines(seconds_each=60)
        self.assertEqual(lines[1], "run: iteration 2 of 5, reward 0.1, 03:00 left")
        self.assertEqual(lines[4], "run: iteration 5 of 5, reward 0.4, 00:00 left")

    def test_without_an_end_no_time_is_left(self):
        lines = self.lines(seconds_each=60, total=None)
        self.assertEqual(lines[1], "run: iteration 2, reward 0.1")

    def test_the_bar_fits_into_80_columns_and_shows_the_metrics(self):
        terminal = Terminal()
        with (
            mock.patch("sys.stderr", terminal),
            mock.patch.dict("os.environ", {"COLUMNS": "80", "LINES": "24"}),
            Progress("summarize_ppo", 1000) as shown,
        ):
            for _ in range(1000):
                shown.update({"reward": -0.123456, "kl": 12.34567, "length": 55.5678})
        last = terminal.getvalue().rstrip("\n").split("\r")[-1]
        self.assertLessEqual(len(last), 80)
        self.assertIn("reward -0.123, kl 12.3, length 55.6", last)

    def test_a_silent_one_shows_nothing(self):
        terminal = Terminal()
        with mock.patch("sys.stderr", terminal), Progress("run", 3, silent=True) as shown:
            shown.update({"reward": 1.0})
        self.assertEqual(terminal.getvalue(), "")


class TestErrors(unittest.TestCase):
    """The one line that a script ends with when something is wrong."""

    TEXT = "error: the folder out/a-rather-long-name/of-a-run holds a run with other options"

    def wrapped(self, stream):
        with (
            mock.patch("sys.stderr", stream),
            mock.patch.dict("os.environ", {"COLUMNS": "40", "LINES": "24"}),
        ):
            return wrapped(self.TEXT)

    def test_on_a_terminal_its_lines_end_between_words(self):
        lines = self.wrapped(Terminal()).splitlines()
        self.assertGreater(len(lines), 1)
        self.assertLessEqual(max(map(len, lines)), 40)
        self.assertEqual(" ".join(lines), self.TEXT)

    def test_in_a_file_it_stays_one_line(self):
        self.assertEqual(self.wrapped(io.StringIO()), self.TEXT)


class TestConsole(unittest.TestCase):
    """A script that only uses the library, in a process of its own."""

    def run_script(self, setup=""):
        script = f"""
            import logging
            from mingpt import progress
            progress.SECONDS_BETWEEN_LINES = 0.0
            from tests.test_trainer import Trainer, config, tiny_gpt, tokens
            logging.getLogger("mingpt").handlers.clear()  # the tests' own
            {setup}
            Trainer(config(), tiny_gpt(), tokens()).run()
            print(len(logging.getLogger("mingpt").handlers))
        """
        code = "\n".join(line.strip() for line in script.splitlines())
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return run.stdout, run.stderr

    def test_it_sees_what_its_training_does(self):
        out, err = self.run_script()
        self.assertIn("training: 6 iterations on cpu", err)
        self.assertEqual(err.count("training: iteration 6 of 6, loss "), 1)
        self.assertEqual(out, "0\n")  # the handler is gone when the run is over

    def test_where_it_has_set_up_logging_that_stays_as_it_is(self):
        for setup in (
            "logging.basicConfig(level=logging.WARNING)",
            "logging.getLogger('mingpt').addHandler(logging.NullHandler())",
        ):
            _, err = self.run_script(setup)
            self.assertNotIn("iteration", err)


class TestWhatIsWatched(unittest.TestCase):
    def watched(self, **options):
        trainer = Trainer(config(**options), tiny_gpt(), tokens(), tokens(5))
        trainer.run()
        return trainer.watched(), trainer

    def test_the_loss_of_training_and_validation(self):
        watched, trainer = self.watched(eval_every=3)
        self.assertEqual(
            watched, {"loss": trainer.metrics["loss"], "valid_loss": trainer.valid_loss}
        )

    def test_without_an_evaluation_the_loss(self):
        watched, _ = self.watched()
        self.assertEqual(list(watched), ["loss"])
