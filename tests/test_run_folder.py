"""What a run keeps in its folder: rows that are cut at the checkpoint, and options that must match.

test_trainer.py has the whole of it: runs that are interrupted, resumed and refused.
"""

import json
import math
import unittest
from unittest import mock

import torch

from mingpt.config import CfgNode
from mingpt.run_folder import RunFolder, finished, read_metrics
from tests.common import TempDirTestCase


def save_checkpoint(folder, iter_num, **options):
    """What a trainer saves, as far as RunFolder reads it."""
    state = {"iter_num": iter_num, "finished": False, "config": options, "rng": [None]}
    folder.save_checkpoint(state)


class TestRows(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.run_folder = RunFolder(self.folder)
        self.metrics = self.folder / "metrics.jsonl"
        self.samples = self.folder / "samples.jsonl"

    def test_a_torn_last_line_is_left_out(self):
        self.metrics.write_text('{"iter": 1}\n{"iter": 2}\n{"iter": 3, "lo')
        self.assertEqual(read_metrics(self.metrics), [{"iter": 1}, {"iter": 2}])

    def test_no_file_has_no_rows(self):
        self.assertEqual(read_metrics(self.folder / "none"), [])

    def test_metrics_are_one_row_a_line(self):
        self.run_folder.log({"iter": 1, "loss": 0.5})
        self.run_folder.log({"iter": 2, "loss": 0.25})
        expected = '{"iter": 1, "loss": 0.5}\n{"iter": 2, "loss": 0.25}\n'
        self.assertEqual(self.metrics.read_text(), expected)

    def test_samples_are_one_row_a_line(self):
        rows = [{"iter": 1, "completion": "so schön\n\u2028 🙂"}, {"iter": 1, "completion": ""}]
        self.run_folder.log_samples(rows)
        self.run_folder.log_samples([{"iter": 2, "completion": [3, 4]}])
        rows.append({"iter": 2, "completion": [3, 4]})
        self.assertEqual(read_metrics(self.samples), rows)
        self.assertEqual(self.samples.read_text().count("\n"), 3)

    def test_rows_hold_no_nan(self):
        self.run_folder.log({"iter": 1, "loss": math.nan, "kl": -math.inf})
        self.run_folder.log_samples([{"iter": 1, "reward": math.inf}])
        self.assertEqual(self.metrics.read_text(), '{"iter": 1, "loss": null, "kl": null}\n')
        self.assertEqual(self.samples.read_text(), '{"iter": 1, "reward": null}\n')

    def test_old_files_with_nan_are_read_and_cut(self):
        self.metrics.write_text('{"iter": 1, "loss": NaN}\n{"iter": 2, "loss": Infinity}\n')
        self.assertTrue(math.isnan(read_metrics(self.metrics)[0]["loss"]))
        save_checkpoint(self.run_folder, iter_num=1)
        self.run_folder.load_checkpoint(CfgNode(), free=set())
        self.assertEqual(self.metrics.read_text(), '{"iter": 1, "loss": null}\n')

    def test_both_files_are_cut_at_the_checkpoint(self):
        for path in (self.metrics, self.samples):
            lines = ['{"iter": 1}', '{"iter": 2}', '{"iter": 2, "n": 2}', '{"iter": 3}', '{"it']
            path.write_text("\n".join(lines))
        save_checkpoint(self.run_folder, iter_num=2)
        self.run_folder.load_checkpoint(CfgNode(), free=set())
        for path in (self.metrics, self.samples):
            with self.subTest(path.name):
                expected = '{"iter": 1}\n{"iter": 2}\n{"iter": 2, "n": 2}\n'
                self.assertEqual(path.read_text(), expected)

    def test_without_a_checkpoint_no_row_stays(self):
        for path in (self.metrics, self.samples):
            path.write_text('{"iter": 0}\n{"iter": 1}\n')
        self.assertIsNone(self.run_folder.load_checkpoint(CfgNode(), free=set()))
        self.assertEqual(read_metrics(self.metrics), [])
        self.assertEqual(read_metrics(self.samples), [])

    def test_a_run_that_logs_no_samples_has_no_file_of_them(self):
        self.run_folder.load_checkpoint(CfgNode(), free=set())
        self.run_folder.log({"iter": 1})
        self.assertFalse(self.samples.exists())

    def test_only_rank_0_writes(self):
        with mock.patch("mingpt.distributed.rank", return_value=1):
            other = RunFolder(self.folder)
        other.log({"iter": 1})
        other.log_samples([{"iter": 1}])
        other.save_best({})
        other.claim({"seed": 1}, free=set())
        save_checkpoint(other, iter_num=1)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_no_folder_keeps_nothing(self):
        nowhere = RunFolder(None)
        nowhere.log({"iter": 1})
        nowhere.log_samples([{"iter": 1}])
        nowhere.save_best({})
        save_checkpoint(nowhere, iter_num=1)
        self.assertIsNone(nowhere.load_checkpoint(CfgNode(), free=set()))
        self.assertIsNone(nowhere.path)


class TestOptionsOfACheckpoint(TempDirTestCase):
    def load(self, then, now, free=(), defaults=None):
        def effective(options):
            return (defaults or {}) | options

        """Load a checkpoint of the options `then` in a run of the options `now`."""
        folder = RunFolder(str(self.folder))  # a string does as well as a Path
        save_checkpoint(folder, iter_num=1, **then)
        return folder.load_checkpoint(CfgNode(**now), set(free), effective)

    def refuses(self, message, *args, **options):
        with self.assertRaisesRegex(ValueError, message):
            self.load(*args, **options)

    def test_the_same_options(self):
        options = {"seed": 1, "betas": (0.9, 0.95), "sizes": [1, 2]}
        self.assertEqual(self.load(options, options)["iter_num"], 1)

    def test_other_options(self):
        message = r"other options \(seed was 1, is 2; rate was None, is 3\)"
        self.refuses(message, {"seed": 1}, {"seed": 2, "rate": 3})

    def test_tuples_and_lists_differ(self):
        self.refuses(r"betas was \[0.9\], is \(0.9,\)", {"betas": [0.9]}, {"betas": (0.9,)})

    def test_free_options_may_change(self):
        self.assertIsNotNone(self.load({"device": "cpu"}, {"device": "cuda"}, free={"device"}))

    def test_another_number_of_processes(self):
        with mock.patch("mingpt.distributed.world_size", return_value=2):
            folder = RunFolder(self.folder)
            with mock.patch("mingpt.distributed.gather", lambda value: [value] * 2):
                save_checkpoint(folder, iter_num=1)
                with self.assertRaisesRegex(ValueError, "number of processes was 1, is 2"):
                    folder.load_checkpoint(CfgNode(), set())

    def test_a_checkpoint_that_only_some_processes_see(self):
        folder = RunFolder(self.folder)
        with (
            mock.patch("mingpt.distributed.gather", return_value=[True, False]),
            self.assertRaisesRegex(ValueError, "only some of the processes see .*checkpoint.pt"),
        ):
            folder.load_checkpoint(CfgNode(), set())

    def test_an_option_that_the_checkpoint_lacks_counts_as_its_default(self):
        then, now = {"seed": 1}, {"seed": 1, "ratio": "token"}
        self.assertIsNotNone(self.load(then, now, defaults={"seed": 5, "ratio": "token"}))

    def test_a_new_option_that_is_not_at_its_default(self):
        then, now = {"seed": 1}, {"seed": 1, "ratio": "sequence"}
        message = "ratio was 'token', is 'sequence'"
        self.refuses(message, then, now, defaults={"seed": 1, "ratio": "token"})

    def test_a_new_option_without_a_default(self):
        self.refuses("ratio was None, is 'token'", {}, {"ratio": "token"})

    def test_the_checkpoints_own_value_goes_before_the_default(self):
        self.refuses("seed was 1, is 5", {"seed": 1}, {"seed": 5}, defaults={"seed": 5})

    def test_an_option_that_no_longer_exists(self):
        self.refuses("baseline was True, is None", {"baseline": True}, {}, defaults={"seed": 1})

    def test_a_default_of_an_option_that_neither_run_has(self):
        self.assertIsNotNone(self.load({"seed": 1}, {"seed": 1}, defaults={"ratio": "token"}))


class TestClaim(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.run_folder = RunFolder(self.folder)

    def options(self):
        return json.loads((self.folder / "config.json").read_text())

    def test_everything_may_change_before_anything_is_saved(self):
        self.run_folder.claim({"seed": 1}, free=set())
        self.run_folder.claim({"seed": 2}, free=set())
        self.assertEqual(self.options(), {"seed": 2})

    def test_afterwards_only_the_free_options_may(self):
        self.run_folder.claim({"seed": 1, "path": "a", "betas": (1, 2)}, free={"path"})
        save_checkpoint(RunFolder(self.folder / "stage"), iter_num=1)
        self.run_folder.claim({"seed": 1, "path": "b", "betas": (1, 2)}, free={"path"})
        self.assertEqual(self.options(), {"seed": 1, "path": "b", "betas": [1, 2]})
        with self.assertRaisesRegex(ValueError, "seed was 1, is 2"):
            self.run_folder.claim({"seed": 2, "path": "b", "betas": (1, 2)}, free={"path"})
        self.assertEqual(self.options()["seed"], 1)

    def test_an_option_that_the_old_run_lacks_counts_as_its_default(self):
        self.run_folder.claim({"seed": 1}, free=set())
        save_checkpoint(self.run_folder, iter_num=1)
        defaults = {"betas": (1, 2)}
        with self.assertRaisesRegex(ValueError, r"betas was \[1, 2\], is \[3, 4\]"):
            self.run_folder.claim({"seed": 1, "betas": (3, 4)}, free=set(), defaults=defaults)
        self.run_folder.claim({"seed": 1, "betas": (1, 2)}, free=set(), defaults=defaults)
        self.assertEqual(self.options(), {"seed": 1, "betas": [1, 2]})

    def test_an_option_that_no_longer_exists(self):
        self.run_folder.claim({"seed": 1, "baseline": True}, free=set())
        save_checkpoint(self.run_folder, iter_num=1)
        with self.assertRaisesRegex(ValueError, "baseline was True, is None"):
            self.run_folder.claim({"seed": 1}, free=set(), defaults={"seed": 1})


class TestFinished(TempDirTestCase):
    def test_a_run_that_has_not_begun(self):
        self.assertIsNone(finished(self.folder))

    def test_a_run_that_has_not_ended(self):
        torch.save({"finished": False, "iter_num": 3}, self.folder / "checkpoint.pt")
        self.assertIsNone(finished(self.folder))

    def test_a_run_that_has_ended(self):
        torch.save({"finished": True, "iter_num": 3}, self.folder / "checkpoint.pt")
        self.assertEqual(finished(self.folder)["iter_num"], 3)


class TestTensorBoard(unittest.TestCase):
    def test_it_needs_a_folder(self):
        with self.assertRaisesRegex(ValueError, "tensorboard=True needs a work_dir"):
            RunFolder(None, tensorboard=True)
