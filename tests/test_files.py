"""Files that are written by killed processes, to full disks, by two runs at once; and hostile ones.

What is written is always readable, and what is read is what was written.
"""

import ast
import collections
import enum
import io
import json
import math
import os
import subprocess
import sys
import threading
import types
import unittest
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from mingpt import weights, weights_gpt2
from mingpt.bpe import BPETokenizer
from mingpt.chars import CharTokenizer
from mingpt.checkpoint import atomic_write, load_torch, save_torch, write_text, write_together
from mingpt.config import CfgNode
from mingpt.heads import RewardModel
from mingpt.model import GPT
from mingpt.run_folder import RunFolder, lock_on_windows, only_run, read_metrics
from mingpt.stages import Stages
from mingpt.trainer import Trainer
from tests.common import ROOT, TempDirTestCase, tiny_gpt

NEEDS_UNIX = unittest.skipUnless(os.name == "posix", "signals, FIFOs and limits of Unix")


def child(script, *args, **options):
    """A Python process that runs the script, with its output as text."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        **options,
    )


def kill(process):
    """End a child with SIGKILL, and close its pipes."""
    process.kill()
    process.communicate()


def logits(model, idx):
    with torch.no_grad():
        return model(idx)[0]


class TestPlainOptions(unittest.TestCase):
    """What a config takes is turned into plain Python where it enters."""

    def check(self, value, expected):
        in_tree = CfgNode(section={"option": value}).section.option
        assigned, merged = CfgNode(), CfgNode()
        assigned.option = value
        merged.merge_from_dict({"option": value})
        for found in (in_tree, assigned.option, merged.option):
            self.assertEqual(found, expected)
            self.assertIs(type(found), type(expected))

    def test_paths(self):
        self.check(Path("out/run"), os.path.join("out", "run"))

    def test_numbers_of_numpy(self):
        self.check(np.float64(0.5), 0.5)
        self.check(np.int32(3), 3)
        self.check(np.bool_(True), True)
        self.check(np.str_("cpu"), "cpu")
        self.check(np.array(3), 3)

    def test_numbers_of_pytorch(self):
        self.check(torch.tensor(3), 3)
        self.check(torch.nn.Parameter(torch.tensor(0.5)), 0.5)

    def test_within_lists_tuples_and_dicts(self):
        class Options(dict):
            pass

        pair = collections.namedtuple("pair", "first second")
        self.check([np.int64(1), (np.float32(0.5),)], [1, (0.5,)])
        self.check(pair(np.int64(1), Path("a")), (1, "a"))
        self.check(torch.Size([1, 2]), (1, 2))
        node = CfgNode()
        node.option = Options(rate=np.float64(1))
        self.assertIs(type(node.option), dict)
        self.assertIs(type(node.option["rate"]), float)

    def test_arrays(self):
        self.check(np.array([1, 2]), [1, 2])
        self.check(torch.tensor([0.5, 0.25]), [0.5, 0.25])

    def test_enums_and_devices(self):
        schedule = enum.StrEnum("Schedule", {"LINEAR": "linear"})
        self.check(schedule.LINEAR, "linear")
        self.check(torch.device("cuda", 1), "cuda:1")


class TestModelsOfPlainOptions(TempDirTestCase):
    def test_a_model_with_numpys_sizes_is_saved(self):
        sizes = {"n_layer": np.int64(2), "resid_pdrop": np.float32(0.5), "tie_weights": np.True_}
        tiny_gpt(**sizes).save_pretrained(self.folder)
        self.assertEqual(json.loads((self.folder / "config.json").read_text())["n_layer"], 2)
        self.assertEqual(GPT.from_pretrained(self.folder).config.resid_pdrop, 0.5)


# -- what torch.save wrote -------------------------------------------------------------------------


class TestRecords(TempDirTestCase):
    """A record of a .pt file that is not as long as its tensor, or is compressed."""

    def setUp(self):
        super().setUp()
        self.model = tiny_gpt()
        self.whole = self.folder / "whole.pt"
        torch.save(self.model.state_dict(), self.whole)

    def rewrite(self, change, compression):
        """The path of a copy in which change(name, content) gives the content of each record."""
        path = self.folder / "changed.pt"
        with zipfile.ZipFile(self.whole) as old, zipfile.ZipFile(path, "w", compression) as new:
            for record in old.infolist():
                name = record.filename.partition("/")[2]
                new.writestr(record.filename, change(name, old.read(record)))
        return path

    def test_a_compressed_file_gives_the_same_weights(self):
        path = self.rewrite(lambda name, content: content, zipfile.ZIP_DEFLATED)
        with mock.patch("torch.load", wraps=torch.load) as load:
            loaded = GPT.from_pretrained(path, n_head=2)
        self.assertFalse(load.call_args.kwargs["mmap"])
        for name, weight in self.model.state_dict().items():
            self.assertTrue(torch.equal(loaded.state_dict()[name], weight), name)

    def test_a_record_that_is_too_short(self):
        def halve_the_first(name, content):
            return content[: len(content) // 2] if name == "data/0" else content

        for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            path = self.rewrite(halve_the_first, compression)
            with self.subTest(compression):
                with self.assertRaisesRegex(ValueError, "changed.pt cannot be loaded.*record"):
                    GPT.from_pretrained(path, n_head=2)
                with self.assertRaisesRegex(ValueError, "changed.pt cannot be loaded.*record"):
                    load_torch(path)

    def test_we_look_at_the_length_ourselves(self):
        # Older versions of PyTorch do not: let this one pass over it, too.
        path = self.rewrite(
            lambda name, content: content[:8] if name == "data/0" else content, zipfile.ZIP_STORED
        )
        with (
            mock.patch("torch.load", return_value={}),
            self.assertRaisesRegex(ValueError, "record 0 has 8 bytes, and its tensor needs 704"),
        ):
            load_torch(path)

    def test_a_file_that_would_unpack_to_more_than_the_memory(self):
        def blow_up(name, content):
            return bytes(300 * 2**20) if name == "data/0" else content

        path = self.rewrite(blow_up, zipfile.ZIP_DEFLATED)
        with self.assertRaisesRegex(ValueError, "would unpack to 300 MB"):
            GPT.from_pretrained(path, n_head=2)

    def test_all_that_a_checkpoint_holds_can_be_outlined(self):
        optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2).long())[1].backward()
        optimizer.step()
        state = {"optimizer": optimizer.state_dict(), "half": torch.ones(3).bfloat16()}
        state |= {"parameter": torch.nn.Parameter(torch.ones(2)), "empty": torch.empty(0)}
        save_torch(self.folder / "state.pt", state)
        self.assertEqual(load_torch(self.folder / "state.pt").keys(), state.keys())


class TestSmallFilesThatAskForMuch(TempDirTestCase):
    def test_many_views_of_the_same_numbers(self):
        numbers = torch.zeros(1000, 1000)
        torch.save({f"h.{i}.ln_1.weight": numbers for i in range(100)}, self.folder / "views.pt")
        with self.assertRaisesRegex(ValueError, "larger than what the file holds"):
            GPT.from_pretrained(self.folder / "views.pt", n_head=2)

    def test_many_blocks_with_tensors_of_other_names(self):
        state = tiny_gpt().state_dict()
        for block in range(2, 1000):
            for number in range(6):
                state[f"transformer.h.{block}.{number}"] = torch.zeros(1)
        torch.save(state, self.folder / "deep.pt")
        built = []

        def build(cls, config):
            built.append(config.n_layer)
            return empty_model(cls, config)

        empty_model = weights.empty_model
        with (
            mock.patch("mingpt.weights.empty_model", build),
            self.assertRaisesRegex(ValueError, "missing .'transformer.h.10.attn.c_attn.bias'"),
        ):
            GPT.from_pretrained(self.folder / "deep.pt", n_head=2)
        self.assertEqual(built, [1])

    def test_a_deep_model_is_no_fault(self):
        model = tiny_gpt(n_layer=weights.DEEP + 1, n_embd=2)
        model.save_pretrained(self.folder)
        idx = torch.zeros(1, 3, dtype=torch.long)
        loaded = GPT.from_pretrained(self.folder)
        torch.testing.assert_close(logits(loaded, idx), logits(model, idx))

    @NEEDS_UNIX
    def test_a_fifo_does_not_hang(self):
        tiny_gpt().save_pretrained(self.folder)
        BPETokenizer.train(["a b"], 257).save_pretrained(self.folder)
        CharTokenizer("ab").save_pretrained(self.folder)
        loaders = {
            "config.json": GPT.from_pretrained,
            "model.safetensors": GPT.from_pretrained,
            "vocab.json": BPETokenizer.from_pretrained,
            "merges.txt": BPETokenizer.from_pretrained,
            "chars.json": CharTokenizer.from_pretrained,
            "checkpoint.pt": lambda folder: load_torch(folder / "checkpoint.pt"),
            "metrics.jsonl": lambda folder: read_metrics(folder / "metrics.jsonl"),
        }
        for name, load in loaders.items():
            path = self.folder / name
            content = path.read_bytes() if path.exists() else b""
            path.unlink(missing_ok=True)
            os.mkfifo(path)
            with self.subTest(name), self.assertRaisesRegex(ValueError, "no file|no weights"):
                load(self.folder)
            path.unlink()
            path.write_bytes(content)


# -- files that say what they are ------------------------------------------------------------------


class TestWhatFilesTell(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.idx = torch.randint(11, (1, 5))

    def test_best_tells_it_wherever_it_is_put(self):
        # four heads, where a preset of this size has three
        model = tiny_gpt(n_layer=3, n_head=4, n_embd=48, resid_pdrop=0.25)
        RunFolder(self.folder / "run").save_best(model.state_dict(), model.config.to_dict())
        [best] = [p for p in (self.folder / "run").iterdir() if p.name != ".lock"]
        (self.folder / "elsewhere.json").write_text("[]")  # has nothing to do with it
        elsewhere = best.rename(self.folder / "elsewhere.pt")
        loaded = GPT.from_pretrained(elsewhere)
        self.assertEqual(loaded.config, model.config)
        torch.testing.assert_close(logits(loaded, self.idx), logits(model, self.idx))

    def test_best_of_a_reward_model(self):
        model = RewardModel.from_gpt(tiny_gpt(n_head=4))
        RunFolder(self.folder).save_best(model.state_dict(), model.config.to_dict())
        loaded = RewardModel.from_pretrained(self.folder / "best.pt")
        torch.testing.assert_close(loaded(self.idx), model(self.idx))

    def test_best_of_a_model_without_options(self):
        model = torch.nn.Linear(2, 3)
        RunFolder(self.folder).save_best(model.state_dict(), None)
        best = torch.load(self.folder / "best.pt", weights_only=True)
        torch.nn.Linear(2, 3).load_state_dict(best)
        self.assertTrue(torch.equal(best["weight"], model.weight))

    def test_transformers_has_twelve_heads_unless_its_config_says_otherwise(self):
        model = tiny_gpt(n_head=12, n_embd=24)
        model.save_pretrained(self.folder)
        config = json.loads((self.folder / "config.json").read_text())
        del config["n_head"]
        (self.folder / "config.json").write_text(json.dumps(config))
        loaded = GPT.from_pretrained(self.folder)
        torch.testing.assert_close(logits(loaded, self.idx), logits(model, self.idx))

    def test_a_model_of_no_dropout(self):
        model = tiny_gpt()
        torch.save(
            {"model": model.state_dict(), "model_args": {"n_head": 2, "dropout": 0.0}},
            self.folder / "nanogpt.pt",
        )
        path = self.folder / "nanogpt.pt"
        config = GPT.from_pretrained(path, activation_function="gelu_new").config
        for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
            self.assertEqual(getattr(config, name), 0.0)

    def test_a_config_that_is_hostile(self):
        tiny_gpt().save_pretrained(self.folder)
        for config in ({"model": {"model_type": []}}, {"model": []}, {"n_head": "two"}):
            (self.folder / "config.json").write_text(json.dumps(config))
            with self.subTest(config), self.assertRaisesRegex(ValueError, "n_head"):
                GPT.from_pretrained(self.folder)

    def test_weights_of_every_type_and_layout(self):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            model = tiny_gpt(tie_weights=False).to(dtype)
            model.save_pretrained(self.folder)
            theirs = load_file(self.folder / "model.safetensors")
            for name, weight in model.named_parameters():
                expected = weight.t() if weights_gpt2.CONV1D.search(name) else weight
                with self.subTest(f"{dtype} {name}"):
                    self.assertTrue(torch.equal(theirs[name], expected))

    @NEEDS_UNIX
    def test_others_may_read_what_the_umask_lets_them(self):
        before = os.umask(0o022)
        try:
            tiny_gpt().save_pretrained(self.folder)
        finally:
            os.umask(before)
        self.assertEqual((self.folder / "model.safetensors").stat().st_mode & 0o777, 0o644)


# -- together or not at all ------------------------------------------------------------------------

# Saves something old, then for each n starts a process that saves something new and is killed
# before its n-th change of the file system. Prints how many there were.
KILLED_SAVES = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from tests.common import tiny_gpt
from mingpt.bpe import BPETokenizer

folder = Path(sys.argv[1])
if sys.argv[2] == "model":
    old, new = tiny_gpt(n_head=2), tiny_gpt(seed=1, n_head=4)
else:
    old, new = BPETokenizer.train(["a b"], 257), BPETokenizer.train(["ab ab ac ac"], 259)

def count(name):
    original = getattr(os, name)
    def counted(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return original(*args, **kwargs)
    setattr(os, name, counted)

n = 0
while True:
    target = folder / str(n)
    old.save_pretrained(target)
    (target / "other.txt").write_text("of somebody else")
    process = os.fork()
    if process == 0:
        left = n
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync"):
            count(name)
        new.save_pretrained(target)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    n += 1
    if status == 0:
        break
print(n)
"""


@NEEDS_UNIX
class TestSavedTogether(TempDirTestCase):
    def killed_saves(self, kind):
        """Folders in which a save was killed ever later; in the last it was not."""
        process = child(KILLED_SAVES, self.folder, kind)
        output, _ = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0)
        self.assertGreater(int(output), 5)
        return [self.folder / str(n) for n in range(int(output))]

    def check_outcomes(self, outcomes):
        """First the old ones, then the new ones."""
        self.assertEqual(outcomes, sorted(outcomes, key=["old", "new"].index))
        self.assertEqual(set(outcomes), {"old", "new"})

    def test_a_model(self):
        idx = torch.randint(11, (1, 8))
        models = {"old": tiny_gpt(n_head=2), "new": tiny_gpt(seed=1, n_head=4)}
        outcomes = []
        for folder in self.killed_saves("model"):
            # Other programs find files that belong together, or no config at all.
            config = folder / "config.json"
            heads = json.loads(config.read_text())["n_head"] if config.exists() else None
            seen = load_file(folder / "model.safetensors")["transformer.ln_f.bias"]
            loaded = GPT.from_pretrained(folder)
            [outcome] = [
                name
                for name, model in models.items()
                if torch.allclose(logits(loaded, idx), logits(model, idx), atol=1e-4)
            ]
            if heads is not None:
                [of_weights] = [
                    model.config.n_head
                    for model in models.values()
                    if torch.equal(model.transformer.ln_f.bias, seen)
                ]
                self.assertEqual(heads, of_weights)
            outcomes.append(outcome)
            self.assertEqual((folder / "other.txt").read_text(), "of somebody else")
        self.check_outcomes(outcomes)

    def test_a_tokenizer(self):
        outcomes = []
        for folder in self.killed_saves("tokenizer"):
            tokenizer = BPETokenizer.from_pretrained(folder)
            outcomes.append({257: "old", 259: "new"}[tokenizer.vocab_size])
            self.assertEqual(tokenizer.decode(tokenizer.encode("ab ac")), "ab ac")
            self.assertEqual((folder / "other.txt").read_text(), "of somebody else")
        self.check_outcomes(outcomes)

    def test_nothing_hidden_stays_after_the_next_save(self):
        folders = self.killed_saves("model")
        for folder in folders:
            tiny_gpt().save_pretrained(folder)
            names = {path.name for path in folder.iterdir()}
            self.assertEqual(names, {"config.json", "model.safetensors", "other.txt"})

    def test_an_exception_leaves_the_old_files(self):
        tiny_gpt().save_pretrained(self.folder)
        with self.assertRaises(KeyError), write_together(self.folder) as new:
            write_text(new / "config.json", "{}")
            raise KeyError
        self.assertEqual(GPT.from_pretrained(self.folder).config.n_head, 2)
        self.assertEqual(len(list(self.folder.iterdir())), 2)

    def test_many_at_once(self):
        models = [tiny_gpt(seed=heads, n_head=heads) for heads in (1, 2, 4, 8)]

        def save_often(model):
            for _ in range(10):
                model.save_pretrained(self.folder)

        threads = [threading.Thread(target=save_often, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        loaded = GPT.from_pretrained(self.folder)
        [model] = [model for model in models if model.config.n_head == loaded.config.n_head]
        self.assertTrue(torch.equal(loaded.lm_head.weight, model.lm_head.weight))
        self.assertEqual(len(list(self.folder.iterdir())), 2)


# -- leftovers -------------------------------------------------------------------------------------

WRITES_FOR_EVER = """
import sys
from mingpt.checkpoint import atomic_write
with atomic_write(sys.argv[1]) as f:
    f.write(bytes(1000)); f.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


@NEEDS_UNIX
class TestLeftovers(TempDirTestCase):
    def names(self):
        return sorted(path.name for path in self.folder.iterdir())

    def test_those_of_killed_processes_go_and_those_of_living_ones_stay(self):
        process = child(WRITES_FOR_EVER, self.folder / "best.pt")
        self.addCleanup(kill, process)
        self.assertEqual(process.stdout.readline(), "writing\n")
        write_text(self.folder / "other", "x")
        self.assertEqual(len(self.names()), 2)  # the living process's file is still there
        kill(process)
        write_text(self.folder / "other", "x")
        self.assertEqual(self.names(), ["other"])

    def test_one_of_a_process_that_had_our_number(self):
        # In a container, the run before this one may well have had it.
        with atomic_write(self.folder / "a") as f:
            name = Path(f.name).name
            write_text(self.folder / "b", "x")
            self.assertTrue((self.folder / name).exists())
        (self.folder / name).write_text("of the run before")
        write_text(self.folder / "b", "x")
        self.assertEqual(self.names(), ["a", "b"])

    def test_files_of_other_machines_and_of_others_stay(self):
        names = [".a.another-machine.1.2", ".bashrc", ".a.b", ".git.1.2"]
        for name in names:
            (self.folder / name).write_text("")
        write_text(self.folder / "b", "x")
        self.assertEqual(self.names(), sorted([*names, "b"]))

    def test_a_run_that_begins_removes_them(self):
        process = child(WRITES_FOR_EVER, self.folder / "checkpoint.pt")
        process.stdout.readline()
        kill(process)
        self.assertEqual(len(self.names()), 1)
        with RunFolder(self.folder).in_use():
            self.assertEqual(self.names(), [".lock"])


# -- full disks ------------------------------------------------------------------------------------

ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from tests.common import tiny_gpt
from mingpt.checkpoint import save_torch, write_text
from mingpt.run_folder import append_rows

folder = Path(sys.argv[1])
model = tiny_gpt(n_embd=64)
actions = {
    "a.pt": lambda: save_torch(folder / "a.pt", {"x": torch.ones(20000)}),
    "a.txt": lambda: write_text(folder / "a.txt", "x" * 20000),
    "a.jsonl": lambda: append_rows(folder / "a.jsonl", [{"text": "x" * 20000}]),
    "model.safetensors": lambda: model.save_pretrained(folder),
}
# a file that grows beyond this fails as it does on a full disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
for name, action in actions.items():
    try:
        action()
    except OSError as error:
        said = f"{name} cannot be written" in str(error) and "MB are free" in str(error)
        print(name, said, error.errno == 27)
"""


class TestFullDisks(TempDirTestCase):
    @NEEDS_UNIX
    def test_every_write_says_so_and_keeps_what_was_there(self):
        tiny_gpt().save_pretrained(self.folder)
        for name in ("a.pt", "a.txt", "a.jsonl"):
            (self.folder / name).write_text("old\n")
        process = child(ON_A_FULL_DISK, self.folder)
        output, _ = process.communicate(timeout=60)
        names = ("a.pt", "a.txt", "a.jsonl", "model.safetensors")
        self.assertEqual(output.splitlines(), [f"{name} True True" for name in names])
        self.assertEqual((self.folder / "a.pt").read_text(), "old\n")
        self.assertEqual((self.folder / "a.txt").read_text(), "old\n")
        self.assertTrue((self.folder / "a.jsonl").read_text().startswith("old\n"))
        self.assertEqual(GPT.from_pretrained(self.folder).config.n_embd, 16)
        self.assertEqual([p.name for p in self.folder.iterdir() if p.name.startswith(".")], [])

    def test_other_errors_stay_what_they_are(self):
        for error in (RuntimeError("of the caller's own"), ConnectionError("no network")):
            with self.assertRaises(type(error)) as raised, atomic_write(self.folder / "a"):
                raise error
            self.assertIs(raised.exception, error)


# -- two runs --------------------------------------------------------------------------------------

HOLDS_A_FOLDER = """
import os, sys, time
from pathlib import Path
from mingpt.run_folder import only_run
with only_run(Path(sys.argv[1])):
    if os.fork() == 0:
        os.close(0)
        os.close(1)
        time.sleep(5)  # as a process that loads data may outlive its parent
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


def trainer_config(folder, **options):
    config = Trainer.get_default_config()
    base = {"device": "cpu", "batch_size": 4, "max_iters": 2, "log_every": 1, "work_dir": folder}
    config.merge_from_dict({**base, **options})
    return config


def data(examples=8):
    x = torch.randint(11, (examples, 6), generator=torch.Generator().manual_seed(1))
    return TensorDataset(x[:, :-1], x[:, 1:])


class TestTwoRuns(TempDirTestCase):
    def trainer(self, **options):
        return Trainer(trainer_config(self.folder, **options), tiny_gpt(), data())

    @NEEDS_UNIX
    def test_the_second_is_refused_until_the_first_is_dead(self):
        process = child(HOLDS_A_FOLDER, self.folder)
        self.addCleanup(kill, process)
        self.assertEqual(process.stdout.readline(), "held\n")
        message = "another run is writing to .*: wait until it has ended, or choose another"
        with self.assertRaisesRegex(ValueError, message):
            self.trainer().run()
        with self.assertRaisesRegex(ValueError, message):
            RunFolder(self.folder).claim({"seed": 1}, free=set())
        self.assertEqual([path.name for path in self.folder.iterdir()], [".lock"])
        # A process that it started lives on, and the lock is free all the same.
        process.kill()
        process.wait()
        self.trainer().run()
        self.assertEqual(len(read_metrics(self.folder / "metrics.jsonl")), 2)

    def test_within_a_process(self):
        outer = self.trainer()
        seen = []

        def run_another(trainer):
            with self.assertRaisesRegex(ValueError, "another run is writing to"):
                self.trainer().run()
            seen.append(trainer.iter_num)

        outer.add_callback("on_batch_end", run_another)
        outer.run()
        self.assertEqual(seen, [0, 1])

    def test_the_lock_is_removed_by_its_run_only(self):
        with only_run(self.folder):
            with self.assertRaises(ValueError), only_run(self.folder):
                pass
            self.assertTrue((self.folder / ".lock").exists())
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_lock_that_is_removed_while_another_run_takes_it(self):
        path = self.folder / ".lock"
        removals = [path.unlink]

        def take(f):
            if removals:
                removals.pop()()  # the run before ends between our opening and locking
            return True

        with mock.patch("mingpt.run_folder.take_lock", take), only_run(self.folder):
            self.assertTrue(path.exists())

    def test_one_after_the_other(self):
        self.trainer().run()
        self.trainer(max_iters=3).run()
        self.assertEqual(len(read_metrics(self.folder / "metrics.jsonl")), 3)

    def test_one_that_failed_lets_go(self):
        with self.assertRaises(KeyError), only_run(self.folder):
            raise KeyError
        self.trainer().run()

    def test_the_processes_of_a_run_are_one(self):
        with RunFolder(self.folder).in_use():
            with mock.patch("mingpt.distributed.rank", return_value=1):
                other = RunFolder(self.folder)
            with other.in_use():
                pass
            refused = mock.patch("mingpt.distributed.gather", lambda value: ["refused", value])
            with refused, self.assertRaisesRegex(ValueError, "refused"), other.in_use():
                pass

    def test_a_stage_that_another_run_is_at(self):
        config = CfgNode(sft=trainer_config(None).to_dict())
        del config.sft.work_dir
        stages = Stages(config, self.folder, {"sft": Trainer})
        with (
            only_run(self.folder / "sft"),
            self.assertRaisesRegex(ValueError, "another run is writing"),
        ):
            stages.run("sft", lambda: Trainer(stages.trainer_config("sft"), tiny_gpt(), data()))
        self.assertFalse((self.folder / "sft" / "options.json").exists())

    def test_a_disk_without_locks(self):
        failure = OSError(37, "No locks available")
        with (
            mock.patch("fcntl.lockf", side_effect=failure),
            self.assertLogs("mingpt", "WARNING") as logs,
            only_run(self.folder),
        ):
            pass
        self.assertIn("cannot be locked", logs.output[0])

    def test_windows(self):
        locking = mock.Mock()
        windows = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
        modules = {"fcntl": None, "msvcrt": windows}
        with mock.patch.dict(sys.modules, modules), only_run(self.folder):
            locking.assert_called_once_with(mock.ANY, 2, 1)
        locking.side_effect = PermissionError(13, "Permission denied")
        with (
            mock.patch.dict(sys.modules, modules),
            self.assertRaisesRegex(ValueError, "another run"),
            only_run(self.folder),
        ):
            pass

    def test_neither_unix_nor_windows(self):
        with mock.patch.dict(sys.modules, {"msvcrt": None}):
            lock_on_windows(io.BytesIO())


# -- resuming --------------------------------------------------------------------------------------


class TestResumeThatIsRefused(TempDirTestCase):
    """Nothing changes: not the model, not the folder."""

    def setUp(self):
        super().setUp()
        self.path = self.folder / "checkpoint.pt"
        Trainer(trainer_config(self.folder), tiny_gpt(), data()).run()
        self.state = torch.load(self.path, weights_only=True)
        # a row behind the checkpoint, as a killed run leaves it
        with (self.folder / "metrics.jsonl").open("a") as f:
            f.write('{"iter": 3}\n')

    def contents(self):
        return {p.name: p.read_bytes() for p in self.folder.iterdir()}

    def refuse(self, message, model=None, examples=8):
        trainer = Trainer(
            trainer_config(self.folder, max_iters=4), model or tiny_gpt(seed=1), data(examples)
        )
        model_before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
        files_before = self.contents()
        self.assertRaisesRegex(ValueError, message, trainer.run)
        self.assertEqual(self.contents(), files_before)
        self.assertEqual(trainer.iter_num, 0)
        for name, x in trainer.model.state_dict().items():
            self.assertTrue(torch.equal(x, model_before[name]), name)

    def test_another_model(self):
        change = r"transformer.wte.weight was torch.float32 \(11, 16\), is torch.float32 \(11, 32\)"
        self.refuse(rf"checkpoint.pt is of another model \({change}", model=tiny_gpt(n_embd=32))
        self.refuse("is of another model .*h.2.*was None", model=tiny_gpt(n_layer=3))

    def test_a_model_of_another_precision(self):
        self.refuse("was torch.float32 .*, is torch.bfloat16", model=tiny_gpt().bfloat16())

    def test_a_dataset_of_another_length(self):
        self.assertEqual(self.state["examples"], 8)
        self.refuse("a run on 8 examples, .* has 4", examples=4)
        self.refuse("a run on 8 examples, .* has 12", examples=12)

    def test_an_old_checkpoint_without_the_length_is_accepted(self):
        del self.state["examples"]
        save_torch(self.path, self.state)
        trainer = Trainer(trainer_config(self.folder, max_iters=3), tiny_gpt(), data(12))
        trainer.run()
        self.assertEqual(trainer.iter_num, 3)

    def test_a_bare_state_dict(self):
        torch.save(tiny_gpt().state_dict(), self.path)
        self.refuse("is no checkpoint of a Trainer: it holds .'transformer.wte.weight'")

    def test_another_optimizer(self):
        self.state["optimizer"]["param_groups"].pop()
        save_torch(self.path, self.state)
        self.refuse("is of another optimizer, with groups of")

    def test_an_optimizer_of_other_shapes(self):
        self.state["optimizer"]["state"][0]["exp_avg_sq"] = torch.zeros(3)
        save_torch(self.path, self.state)
        self.refuse("is of another optimizer")

    def test_a_part_that_is_missing(self):
        for name in ("model", "optimizer", "scaler", "seconds"):
            with self.subTest(name):
                save_torch(self.path, {k: v for k, v in self.state.items() if k != name})
                self.refuse(rf"checkpoint.pt is damaged: it lacks \['{name}'\]")

    def test_a_part_of_another_kind(self):
        parts = {"iter_num": -1, "seed": "x", "config": [], "rng": {}, "model": [], "scaler": 3}
        for name, value in parts.items():
            with self.subTest(name):
                save_torch(self.path, {**self.state, name: value})
                self.refuse(f"checkpoint.pt is damaged: its {name} is")

    def test_hostile_states(self):
        rng = self.state["rng"][0]
        hostile = {
            "text for weights": {"model": dict.fromkeys(self.state["model"], "x")},
            "an optimizer without groups": {"optimizer": {}},
            "text for means": {"optimizer": {**self.state["optimizer"], "state": {0: "x"}}},
            "options of another kind": {"config": {1: 2}},
            "numbers for groups": {"optimizer": {"state": {}, "param_groups": [1, 2]}},
            "no random states": {"rng": [None]},
            "short random states": {"rng": [{**rng, "torch": torch.zeros(3).byte()}]},
            "other random states": {"rng": [{**rng, "numpy": ("MT19937", [1], 0, 0, 0.0)}]},
        }
        for name, part in hostile.items():
            with self.subTest(name):
                save_torch(self.path, {**self.state, **part})
                self.refuse("another model|is damaged|other options|damaged state of the random")


class TestWeightsThatAreNotFinite(TempDirTestCase):
    def run_spoilt(self, iteration, **options):
        trainer = Trainer(trainer_config(self.folder, max_iters=4, **options), tiny_gpt(), data())

        def spoil(trainer):
            if trainer.iter_num == iteration:
                trainer.model.lm_head.weight.data[0] = math.nan

        trainer.add_callback("on_batch_end", spoil)
        with self.assertRaises(FloatingPointError) as raised:
            trainer.run()
        return str(raised.exception)

    def test_it_says_which_checkpoint_is_good(self):
        message = self.run_spoilt(iteration=2, checkpoint_every=1)
        self.assertRegex(message, "iteration 3: .*checkpoint.pt, of iteration 2, is still good")
        self.assertEqual(load_torch(self.folder / "checkpoint.pt")["iter_num"], 2)

    def test_it_says_that_there_is_none(self):
        self.assertIn("there is no earlier one", self.run_spoilt(0, checkpoint_every=1))
        self.assertFalse((self.folder / "checkpoint.pt").exists())

    def test_a_buffer_may_be_infinite(self):
        class Masked(torch.nn.Linear):
            def __init__(self):
                super().__init__(2, 1)
                self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

        def loss(model, batch):
            return model(batch[0]).mean()

        dataset = TensorDataset(torch.ones(8, 2))
        Trainer(trainer_config(self.folder), Masked(), dataset, loss_fn=loss).run()
        self.assertTrue((self.folder / "checkpoint.pt").exists())


# -- text files ------------------------------------------------------------------------------------


class TestTextFiles(TempDirTestCase):
    def test_rows_that_were_cut_within_a_character(self):
        whole = '{"iter": 1, "text": "ü\u2028"}\n{"iter": 2, "text": "ü"}\n'.encode()
        (self.folder / "samples.jsonl").write_bytes(whole[:-4])
        rows = read_metrics(self.folder / "samples.jsonl")
        self.assertEqual(rows, [{"iter": 1, "text": "ü\u2028"}])

    def test_rows_of_somebody_else_stay(self):
        path = self.folder / "metrics.jsonl"
        path.write_text('{"note": 1}\n{"iter": "x"}\n{"iter": 1}\n')
        RunFolder(self.folder).load_checkpoint(CfgNode(), free=set())
        self.assertEqual(path.read_text(), '{"note": 1}\n{"iter": "x"}\n')

    def test_vocabularies_that_are_damaged(self):
        damaged = {
            "vocab.json": (b"{", b"[]", b'{"a": "b"}', b"\xff\xfe{}", b"[" * 100_000),
            "merges.txt": (b"#version: 0.2\nab\n", b"a b c\n", b"\xe4 b\n"),
        }
        for name, contents in damaged.items():
            BPETokenizer.train(["a b"], 257).save_pretrained(self.folder)
            for content in contents:
                (self.folder / name).write_bytes(content)
                message = self.assertRaisesRegex(ValueError, name)
                with self.subTest(name, content=content[:9]), message:
                    BPETokenizer.from_pretrained(self.folder)

    def test_characters_that_are_damaged(self):
        for content in (b"", b"{}", b"[1]", b"\xff"):
            (self.folder / "chars.json").write_bytes(content)
            with self.subTest(content), self.assertRaisesRegex(ValueError, "chars.json"):
                CharTokenizer.from_pretrained(self.folder)
        (self.folder / "chars.json").unlink()
        with self.assertRaisesRegex(ValueError, "chars.json is no file"):
            CharTokenizer.from_pretrained(self.folder)

    def test_json_is_strict_wherever_numbers_are_written(self):
        # These write texts and whole numbers only, or write no file.
        may_call_dumps = {"checkpoint.py", "bpe.py", "model_files.py", "datasets.py"}
        may_call_dumps |= {"tokenizer_files.py", "templates.py", "exchange.py", "store.py"}
        may_call_dumps |= {"corpus.py", "sides.py", "text.py"}
        for folder in ("mingpt", "projects"):
            for path in (ROOT / folder).rglob("*.py"):
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, ast.Attribute) and ast.unparse(node) == "json.dumps":
                        self.assertIn(path.name, may_call_dumps)
