"""
What a user runs must run on Windows, on macOS, and on Apple's GPUs.

None of them is at hand where these tests run. So a child process is made to look like them: see
other_system.py and pretended_gpu.py, which say what they take away.
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
import unittest

from mingpt.run_folder import read_metrics
from tests.common import ROOT, TempDirTestCase

HAPPY_GPT = ROOT / "projects" / "happy_gpt" / "happy_gpt.py"
SHORT = [
    "--model.model_type=gpt-nano",
    "--pretrain.max_iters=4",
    "--pretrain.batch_size=4",
    "--pretrain.eval_every=2",
    "--pretrain.checkpoint_every=2",
    "--sft.max_iters=4",
    "--sft.batch_size=4",
    "--sft.eval_every=4",
    "--rl.max_iters=2",
    "--rl.batch_size=8",
    "--rl.checkpoint_every=1",
    "--report.samples=16",
    "--report.frontier_samples=32",
    "--report.every=2",
]
# Modules that one system alone has, and what os and signal have on one system alone.
MODULES = {
    *("crypt", "fcntl", "grp", "msvcrt", "nis", "posix", "pty", "pwd", "resource", "spwd"),
    *("syslog", "termios", "tty", "winreg", "winsound", "_winapi"),
}
ATTRIBUTES = {
    *("os.fork", "os.forkpty", "os.getuid", "os.geteuid", "os.getloadavg", "os.killpg", "os.nice"),
    *("os.mkfifo", "os.setsid", "os.sched_getaffinity", "os.statvfs", "os.uname", "os.startfile"),
    *("os.dup", "os.dup2", "os.wait", "os.waitid", "os.sysconf", "os.getpgid"),
    *("signal.SIGKILL", "signal.SIGHUP", "signal.SIGALRM", "signal.SIGCHLD", "signal.SIGUSR1"),
    *("signal.SIGQUIT", "signal.SIGPIPE", "signal.alarm", "signal.setitimer", "signal.pause"),
}


def sources():
    """(path, syntax tree) of every file that a user runs."""
    for folder in ("mingpt", "projects"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(node):
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module]
    return []


def is_binary_mode(node):
    """Whether a piece of syntax is a mode like "rb"."""
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_text and re.fullmatch(r"[rwax+]+b[+]?", node.value) is not None


def opens_text(call):
    """Whether a call reads or writes text of which Python chooses the encoding."""
    function = ast.unparse(call.func)
    name = function.rpartition(".")[2]
    options = {keyword.arg for keyword in call.keywords}
    # our own read_text functions know their encoding; an archive, a file in it (wheel.open), a
    # folder and an address are no text
    no_text = ("read_text", "tarfile.open", "wheel.open", "os.open", "webbrowser.open")
    if "encoding" in options or function in no_text:
        return False
    if name == "read_text":
        return True
    if name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        return not any(is_binary_mode(node) for arg in call.args for node in ast.walk(arg))
    # subprocess.run(..., text=True), but not Answer(text=text)
    is_set = {keyword.arg for keyword in call.keywords if isinstance(keyword.value, ast.Constant)}
    return bool(is_set & {"text", "universal_newlines"})


class TestSources(unittest.TestCase):
    def test_no_module_is_needed_that_one_system_alone_has(self):
        for path, tree in sources():
            for node in tree.body:  # within a function it may be tried
                needed = MODULES.intersection(imported_modules(node))
                self.assertFalse(needed, f"{path}, line {node.lineno}")

    def test_nothing_of_os_and_signal_is_needed_that_one_system_alone_has(self):
        for path, tree in sources():
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute):
                    name = ast.unparse(node)
                    self.assertNotIn(name, ATTRIBUTES, f"{path}, line {node.lineno}")

    def test_text_files_and_pipes_name_their_encoding(self):
        for path, tree in sources():
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    self.assertFalse(opens_text(node), f"{path}, line {node.lineno}")

    def test_the_check_finds_what_it_looks_for(self):
        for call, expected in (
            ("open('x')", True),
            ("path.open('a')", True),
            ("path.read_text()", True),
            ("subprocess.run(c, text=True)", True),
            ("path.open('rb')", False),
            ("path.open('r+b' if exists else 'wb')", False),
            ("open('x', encoding='utf-8')", False),
            ("read_text(path)", False),
            ("os.open(folder, os.O_RDONLY)", False),
        ):
            with self.subTest(call):
                self.assertEqual(opens_text(ast.parse(call, mode="eval").body), expected)


class ChildTestCase(TempDirTestCase):
    def run_python(self, *args, **environment):
        """(stdout, stderr) of a Python process that must succeed, both as bytes."""
        child = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=self.folder,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        printed = child.stdout.decode("utf-8", "replace") + child.stderr.decode("utf-8", "replace")
        self.assertEqual(child.returncode, 0, printed)
        return child.stdout, child.stderr


class TestMainJob(ChildTestCase):
    """HappyGPT, from its texts to its report."""

    def setUp(self):
        super().setUp()
        # Half of the texts have what code page 1252 lacks: Greek, Chinese, an arrow, an emoji.
        words = ["love", "hate", "happy", "sad", "the", "day", "π", "日本", "→", "\U0001f600"]
        generator = random.Random(0)
        rows = []
        for _ in range(300):
            text = " ".join(generator.choices(words, k=generator.randint(2, 20)))
            rows.append({"text": text, "rating": text.count("love") - text.count("hate")})
        self.texts = self.folder / "texts.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        self.texts.write_text("\n".join(lines), encoding="utf-8")
        self.options = [f"--data.path={self.texts}", "--system.work_dir=out", *SHORT]

    def check_report(self):
        """The run has reached its end."""
        out = self.folder / "out"
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        self.assertIsNotNone(summary["kl_rl"])
        stages = {row["stage"] for row in read_metrics(out / "metrics.jsonl")}
        self.assertEqual(stages, {"pretrain", "sft", "rl"})
        return summary

    @unittest.skipUnless(sys.platform == "linux", "other_system.py needs /proc")
    def test_on_a_system_that_lacks_what_unix_has(self):
        script = ROOT / "tests" / "other_system.py"
        # a process that loads data, which is spawned
        self.run_python(script, HAPPY_GPT, *self.options, "--sft.num_workers=1")
        self.assertIsNone(self.check_report()["peak_rss_mb"])
        # Again: all files of the first run are there to be read and replaced.
        self.run_python(script, HAPPY_GPT, *self.options)
        self.check_report()

    def test_with_the_locale_of_windows(self):
        environment = {
            # Files: an encoding that has nothing but ASCII. Console: code page 1252.
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONIOENCODING": "cp1252",
            # Python names each place where it had to choose an encoding.
            "PYTHONWARNDEFAULTENCODING": "1",
        }
        stdout, stderr = self.run_python(HAPPY_GPT, *self.options, **environment)
        self.check_report()
        self.assertIn("reward", stdout.decode("cp1252"))
        self.assertNotIn("EncodingWarning", self.lines_about(ROOT, stderr))
        # The samples have the characters that the console cannot show.
        samples = (self.folder / "out" / "samples.md").read_text(encoding="utf-8")
        self.assertRaises(UnicodeEncodeError, samples.encode, "cp1252")
        self.assertIn("?", stdout.decode("cp1252"))

    def lines_about(self, folder, stderr):
        """The lines that name a file in this folder."""
        lines = stderr.decode("cp1252", "replace").splitlines()
        return "\n".join(line for line in lines if line.startswith(str(folder)))


class TestParts(ChildTestCase):
    @unittest.skipUnless(sys.platform == "linux", "other_system.py needs /proc")
    def test_docstrings_are_read_by_spawned_processes(self):
        script = self.folder / "read.py"
        script.write_text(
            "import docstrings\n"
            "if __name__ == '__main__':\n"
            "    print(len(docstrings.read_docstrings('json,email')))\n",
            encoding="utf-8",
        )
        project = ROOT / "projects" / "summarize_rlhf"
        environment = {"PYTHONPATH": os.pathsep.join([str(project), str(ROOT)])}
        spawned, _ = self.run_python(ROOT / "tests" / "other_system.py", script, **environment)
        as_usual, _ = self.run_python(script, **environment)
        self.assertGreater(int(as_usual), 10)
        self.assertEqual(int(spawned), int(as_usual))

    @unittest.skipUnless(sys.platform == "linux", "other_system.py needs /proc")
    def test_a_model_can_be_saved_to_where_it_was_loaded_from(self):
        script = self.folder / "again.py"
        script.write_text(
            "import torch\n"
            "from mingpt.model import GPT\n"
            "from tests.common import tiny_gpt\n"
            "tiny_gpt().save_pretrained('model')\n"
            "model = GPT.from_pretrained('model')\n"
            "model.save_pretrained('model')\n"
            "torch.save(model.state_dict(), 'model.pt')\n"
            "model = GPT.from_pretrained('model.pt', n_head=2)\n"
            "torch.save(model.state_dict(), 'model.pt')\n",
            encoding="utf-8",
        )
        self.run_python(ROOT / "tests" / "other_system.py", script)

    def test_a_console_that_lacks_a_character_shows_a_question_mark(self):
        code = (
            "from mingpt.checkpoint import run_script\n"
            "run_script(lambda args: print('π/2 → \\N{WINKING FACE}'))\n"
        )
        stdout, _ = self.run_python("-c", code, PYTHONIOENCODING="cp1252")
        self.assertEqual(stdout.decode("cp1252").strip(), "?/2 ? ?")

    def test_options_can_be_printed_on_any_console(self):
        code = (
            "from mingpt.model import GPT\n"
            "from mingpt.rlhf import PPOTrainer\n"
            "from mingpt.trainer import Trainer\n"
            "for configurable in (GPT, PPOTrainer, Trainer):\n"
            "    print(configurable.get_default_config())\n"
        )
        stdout, _ = self.run_python("-c", code, PYTHONIOENCODING="cp1252")
        self.assertIn("learning_rate", stdout.decode("cp1252"))

    def test_peak_memory_is_unknown_without_resource_and_known_without_proc(self):
        code = (
            "import pathlib, sys\n"
            "from mingpt.utils import peak_memory_mb\n"
            "def missing(*args, **kwargs): raise FileNotFoundError\n"
            "pathlib.Path.read_text = missing\n"
            "print(peak_memory_mb() > 0)\n"
            "sys.modules['resource'] = None\n"
            "print(peak_memory_mb())\n"
        )
        stdout, _ = self.run_python("-c", code)
        self.assertEqual(stdout.decode().split(), ["True", "None"])

    def test_a_pytorch_without_torch_distributed(self):
        code = (
            "import torch.distributed as dist\n"
            "dist.is_available = lambda: False\n"
            "del dist.is_torchelastic_launched, dist.is_initialized\n"
            "from mingpt import distributed\n"
            "import torch\n"
            "print(distributed.join(torch.device('cpu')), distributed.rank())\n"
            "print(distributed.world_size(), distributed.total([1.0]), distributed.gather(2))\n"
        )
        stdout, _ = self.run_python("-c", code)
        self.assertEqual(stdout.decode().split(), ["cpu", "0", "1", "[1.0]", "[2]"])


class TestPretendedGpu(unittest.TestCase):
    """All jobs run on a device that refuses what Apple's GPUs refuse."""

    @classmethod
    def setUpClass(cls):
        child = subprocess.run(
            [sys.executable, "-m", "tests.pretended_gpu"],
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert child.returncode == 0, child.stderr
        cls.errors = json.loads(child.stdout)

    def test_a_language_model(self):
        self.assertEqual(self.errors["language_model"], "")

    def test_demonstrations(self):
        self.assertEqual(self.errors["demonstrations"], "")

    def test_a_reward_model(self):
        self.assertEqual(self.errors["reward_model"], "")

    def test_dpo_ipo_and_simpo(self):
        self.assertEqual(self.errors["preference_losses"], "")

    def test_ppo_and_its_family(self):
        self.assertEqual(self.errors["ppo_family"], "")

    def test_a_llama(self):
        self.assertEqual(self.errors["llama"], "")

    def test_ppo_with_a_shared_trunk_and_a_reward_model(self):
        self.assertEqual(self.errors["shared_trunk"], "")

    def test_generation(self):
        self.assertEqual(self.errors["generation"], "")

    def test_evaluation(self):
        self.assertEqual(self.errors["assessment"], "")

    def test_the_device_refuses_what_it_should(self):
        for job, words in (
            ("float64_tensor", "does not support torch.float64"),
            ("numbers_of_float64", "does not support torch.float64"),
            ("two_devices", "of the CPU beside the device's"),
            ("foreign_generator", "expected a generator"),
            ("numpy_of_the_device", "use cpu"),
            ("copy_without_waiting", "nobody waits for"),
        ):
            with self.subTest(job):
                self.assertRegex(self.errors[job], re.escape(words))


if __name__ == "__main__":
    unittest.main()
