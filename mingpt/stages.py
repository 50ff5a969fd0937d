"""
A run of several stages in one folder, for example pre-training, fine-tuning, and PPO. A
stage is the run of one Trainer. It begins with the model that an earlier stage has left.

    stages = Stages(config, "out/run", {"pretrain": Trainer, "sft": Trainer, "rl": PPOTrainer})
    stages.run("pretrain", make_pretrain)      # make_pretrain() returns the stage's Trainer
    stages.run("sft", make_sft)                # make_sft() begins with stages.load("pretrain")
    stages.run("rl", make_rl)

The script's config has one section for each stage (config.pretrain, ...), and sections that
all stages share (config.data, config.model, ...). So a stage depends on the options of its
own section, of the stages before it, and on the shared ones. Three rules keep people from
losing hours of work:

1. The options of all stages are checked before the first one begins, so that a typo in the last
   one is found at once.
2. The options that a stage depends on are locked once it has saved something. Those of later
   stages stay free until then.
3. With `base`, a run starts from the finished stages of another run, if their options agree.

What the folder holds:

    sft/options.json      every option that the stage depends on
    sft/checkpoint.pt     the trainer's own files: see run_folder.py
    sft/model/            what the stage leaves behind: `from_pretrained` reads it
    sft/finished.json     written last: the stage is finished, and how long it trained
"""

import fnmatch
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mingpt import distributed, lora
from mingpt.checkpoint import read_json, to_json, write_text
from mingpt.config import CfgNode, check_is_config, check_present
from mingpt.heads import ActorCritic
from mingpt.model import GPT
from mingpt.run_folder import RunFolder, as_json
from mingpt.trainer import FREE_TO_CHANGE, Trainer
from mingpt.utils import pick_device
from mingpt.weights import Pretrained

logger = logging.getLogger("mingpt")


class Stages:
    """The stages of a run, in the folder `folder`.

    config: all options of the script.
    order: {stage: the class of its Trainer}, in the order in which they run. None instead of a
        class says that with these options the stage does not take place.
    base: the folder of another run, whose finished stages are used instead of running them here.
    sections: {stage: names of the sections it reads}. The first holds the options of its Trainer.
        By default, a stage reads the section of its own name.
    extras: {stage: names of the options in that first section which its Trainer does not have}.
    overrides: {stage: {option: value}}, options of the Trainer that the script sets itself.
    free: dotted names of options that may always change; `report.*` stands for a whole section.
    facts: {name: value} of whatever else every stage depends on: a vocabulary, for example.
    tokenizer: is saved beside each stage's model.

    Raises ValueError, before anything is trained, for options that a Trainer refuses, for
    options that are locked, and for a base that cannot be used.
    """

    def __init__(
        self,
        config: CfgNode,
        folder: str | Path,
        order: dict[str, type[Trainer] | None],
        base: str | Path | None = None,
        *,
        sections: dict[str, Iterable[str]] | None = None,
        extras: dict[str, Iterable[str]] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        free: Iterable[str] = (),
        facts: dict[str, Any] | None = None,
        tokenizer: Any = None,
    ):
        check_is_config(config, "the script")
        check_tables(order, sections=sections, extras=extras, overrides=overrides)
        self.config = config
        self.folder = Path(folder)
        self.order = order
        self.base = Path(base) if base else None
        self.sections = {name: [name] for name in order}
        self.sections |= {name: list(names) for name, names in (sections or {}).items()}
        self.extras = extras or {}
        self.overrides = overrides or {}
        self.free = list(free)
        self.tokenizer = tokenizer
        # {dotted name: value} of all options, in the form in which a file holds them.
        self.options = as_json(dict(config.leaves()) | (facts or {}))
        # The three rules, one line each.
        self.check_options()
        self.check_locks()
        self.from_base = self.usable_in_base()

    @property
    def names(self) -> list[str]:
        """The stages that take place, in order."""
        return [name for name, trainer_class in self.order.items() if trainer_class is not None]

    # -- running -----------------------------------------------------------------------------------

    def run(
        self, name: str, make_trainer: Callable[[], Trainer], tokenizer: Any = None
    ) -> Trainer | None:
        """Run a stage to its end, and save its model. None if it was finished already.

        make_trainer: called without arguments, returns the Trainer, with the config that
        `trainer_config` gives. An interrupted stage continues from its last checkpoint.
        tokenizer: is saved with the model, in place of the one that all stages share.
        """
        if self.finished(name):
            return None
        tokenizer = tokenizer or self.tokenizer
        trainer = make_trainer()
        model = model_to_save(trainer)  # first, so that a model that cannot be saved is not trained
        self.lock(name)
        trainer.run()
        # What is left for the next stage. finished.json comes last: where it is, all else is.
        if distributed.rank() == 0:
            self.save_model(model, self.folder / name / "model", tokenizer)
            figures = {"iterations": trainer.iter_num, "seconds": trainer.seconds}
            write_json(self.folder / name / "finished.json", figures)
        distributed.gather(None)  # no process goes on before the model is there
        return trainer

    def save_model(self, model: Any, folder: Path, tokenizer: Any) -> None:
        """Write a stage's model, with a tokenizer if there is one, for the next stage to read.

        An adapter is merged into the model. A subclass may save it by itself.
        """
        plain(model).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def trainer_config(self, name: str) -> CfgNode:
        """The options of a stage's Trainer: its section, without extras, with overrides."""
        # A Trainer refuses options that it does not know.
        section = self.sections[name][0]
        check_present(self.config, [section])
        options = getattr(self.config, section).to_dict()
        missing = sorted(set(self.extras.get(name, ())) - options.keys())
        if missing:
            raise ValueError(f"extras names {missing}, which the section {section} lacks")
        for extra in self.extras.get(name, ()):
            del options[extra]
        options |= self.overrides.get(name, {})
        return CfgNode(**options, work_dir=str(self.folder / name))

    def lock(self, name: str) -> None:
        """Keep the options with which a stage begins, or continues longer than planned.

        ValueError while another run is at this stage.
        """
        folder = RunFolder(self.folder / name)
        with folder.in_use():  # else another run would lose its options
            if folder.output:
                # Removed first, so that a crash between the two leaves an unfinished stage.
                (folder.output / "finished.json").unlink(missing_ok=True)
                write_json(folder.output / "options.json", self.options_of(name))

    # -- what finished stages left -----------------------------------------------------------------

    def finished(self, name: str) -> bool:
        """Whether a stage is finished, here or in base."""
        if name in self.from_base:
            return True
        # If it is made longer, it has to continue. `check_locks` has let no other change pass.
        return is_finished(self.folder / name) and not self.changes(name, self.folder)

    def stage_folder(self, name: str) -> Path:
        """The folder of a finished stage, here or in base. ValueError if it is not finished."""
        if not self.finished(name):
            raise ValueError(
                f"the stage {name} is not finished in {self.folder}: run it first, with the same "
                "options (or give --base=FOLDER, the folder of a run in which it is finished)"
            )
        if self.base is not None and name in self.from_base:
            return self.base / name
        return self.folder / name

    def model_folder(self, name: str) -> Path:
        """The model/ of a finished stage, for `from_pretrained`. ValueError if not finished."""
        return self.stage_folder(name) / "model"

    def load(self, name: str, model_class: Any = GPT, device: str = "auto") -> Any:
        """The model of a finished stage, on the device, in evaluation mode.

        model_class: GPT, RewardModel, or another class with `from_pretrained`.
        """
        saved = model_class.from_pretrained(self.model_folder(name))
        # Fill a fresh model instead of returning this one, which is mapped from the file, with its
        # matrices transposed. The digits of a run depend on how matrices lie in memory, and on the
        # random numbers that making a model takes.
        model = model_class(saved.config)
        model.load_state_dict(saved.state_dict())
        return model.to(distributed.join(pick_device(device))).eval()

    def seconds(self) -> float:
        """How long all the finished stages trained."""
        total = 0.0
        for name in self.names:
            if self.finished(name):
                total += read_json(self.stage_folder(name) / "finished.json")["seconds"]
        return total

    # -- which options a stage depends on ----------------------------------------------------------

    def options_of(self, name: str) -> dict[str, Any]:
        """{dotted name: value} of every option that a stage depends on, apart from the free ones.

        Its own, those of the stages before it, and those in sections that belong to no
        stage.
        """
        # The sections that this stage and those before it read ...
        order = list(self.order)
        before = [other for other in self.names if order.index(other) < order.index(name)]
        read = {section for stage in [*before, name] for section in self.sections[stage]}
        # ... and the shared ones: that is all but the sections of other stages.
        unread = self.owned_sections() - read
        return {
            option: value
            for option, value in self.options.items()
            if section_of(option) not in unread and not self.is_free(option)
        }

    def owned_sections(self) -> set[str]:
        """The sections that belong to a stage; all stages share the others."""
        return {section for sections in self.sections.values() for section in sections}

    def is_free(self, option: str) -> bool:
        """Whether an option may change at any time."""
        # The script says so; or every Trainer lets a continued run change it, like log_every.
        if any(fnmatch.fnmatchcase(option, pattern) for pattern in self.free):
            return True
        section, _, leaf = option.rpartition(".")
        return section in self.owned_sections() and leaf in FREE_TO_CHANGE

    def changes(self, name: str, folder: Path, may_be_longer: bool = False) -> list[str]:
        """In words, each option of a stage that is not what it was when the stage ran in folder.

        may_be_longer: leave out what only makes the stage longer, where its Trainer allows
        that.
        """
        stored = stored_options(folder, name)
        if stored is None:
            return []
        then = self.in_effect(stored)
        now = self.in_effect(self.options)
        changes = []
        for option in self.options_of(name):
            before = then.get(option)
            value = now[option]
            if before == value:
                continue
            if may_be_longer and self.is_longer(name, option, before, value):
                continue
            changes.append(f"{option} was {before!r}, is {value!r}")
        return changes

    def in_effect(self, options: dict[str, Any]) -> dict[str, Any]:
        """{dotted name: value} of options as the Trainers understand them.

        Options that are written differently may mean the same. One that did not exist yet
        counts as its default, because that is how the old run behaved.
        """
        options = dict(options)
        for name in self.names:
            trainer_class = self.order[name]
            assert trainer_class is not None  # names are those that take place
            # Take the section of the Trainer out, let the Trainer read it, and put it back.
            prefix = self.sections[name][0] + "."
            section = {
                option.removeprefix(prefix): value
                for option, value in options.items()
                if option.startswith(prefix)
            }
            for leaf, value in trainer_class.effective_options(section).items():
                options[prefix + leaf] = value
        return as_json(options)

    def is_longer(self, name: str, option: str, before: Any, value: Any) -> bool:
        """Whether the change only makes the stage longer, and its learning rate allows that."""
        # Where the learning rate decays towards the end, another end would change every step.
        section = self.sections[name][0]
        if option not in (f"{section}.max_iters", f"{section}.epochs"):
            return False
        if getattr(self.config, section).lr_schedule != "constant":
            return False
        # None means without end.
        return value is None or (before is not None and value >= before)

    # -- checks ------------------------------------------------------------------------------------

    def check_options(self) -> None:
        """ValueError where a Trainer refuses its options; the stages' names are checked, too."""
        # A misspelt stage would be passed over without a word.
        for option in ("sections", "extras", "overrides"):
            unknown = set(getattr(self, option)) - set(self.order)
            if unknown:
                raise ValueError(f"{option} names {sorted(unknown)}, which are no stages of order")
        for name in self.names:
            trainer_class = self.order[name]
            assert trainer_class is not None  # names are those that take place
            try:
                trainer_class.check_config(self.trainer_config(name), distributed.world_size())
            except ValueError as error:
                where = f"--{self.sections[name][0]}.*"
                raise ValueError(f"the stage {name} cannot run ({where}): {error}") from error

    def check_locks(self) -> None:
        """ValueError where a stage that has begun in this folder had other options."""
        earlier: list[str] = []  # finished stages with the same options: another run can use them
        for name in self.order:
            if not has_begun(self.folder / name):
                continue
            changes = self.changes(name, self.folder, may_be_longer=True)
            if changes:
                # Name the way out that loses least.
                way_out = "put them back, or choose another work_dir"
                if earlier:
                    way_out += (
                        f", where --base={self.folder} starts from the finished stages of this "
                        f"run ({', '.join(earlier)})"
                    )
                raise ValueError(
                    f"the stage {name} in {self.folder} has begun with other options "
                    f"({'; '.join(changes)}): {way_out}"
                )
            if is_finished(self.folder / name):
                earlier.append(name)

    def usable_in_base(self) -> set[str]:
        """The stages to take from base: in order, until one is not finished or differs there."""
        if self.base is None:
            return set()
        # A stage depends on those before it. So where one cannot be used, no later one can.
        usable = set()
        obstacle = ""
        for name in self.names:
            if has_begun(self.folder / name):
                continue  # this run has its own
            if not is_finished(self.base / name):
                obstacle = f"the stage {name} is not finished there"
                break
            changes = self.changes(name, self.base)
            if changes:
                obstacle = f"its stage {name} had other options ({'; '.join(changes)})"
                break
            usable.add(name)
        # Nothing of it can be used: then it is a mistake, unless this run is under way already.
        if not usable and not any(has_begun(self.folder / name) for name in self.names):
            raise ValueError(
                f"no stage of --base={self.base} can be used: {obstacle}. Put the options back, "
                "finish the stage with its own command, or leave --base out"
            )
        logger.info(
            "from %s: %s%s",
            self.base,
            ", ".join(name for name in self.names if name in usable) or "nothing",
            f"; {obstacle}" if obstacle else "",
        )
        return usable


# --------------------------------------------------------------------------------------------------
# A stage's model, and its files


def check_tables(order: Any, **tables: Any) -> None:
    """TypeError unless order is {stage: a class of trainers or None} and the others are dicts."""
    is_dict = isinstance(order, dict) and len(order) > 0
    if not is_dict or not all(is_trainer_class(value) for value in order.values()):
        raise TypeError(f"order is {order!r:.60}; expected {{stage: Trainer, a subclass, or None}}")
    for name, value in tables.items():
        if value is not None and not isinstance(value, dict):
            raise TypeError(f"{name} is {value!r:.60}; expected a dict with a stage for each key")


def is_trainer_class(value: Any) -> bool:
    """Whether value is Trainer, a subclass of it, or None."""
    return value is None or (isinstance(value, type) and issubclass(value, Trainer))


def model_to_save(trainer: Trainer) -> Any:
    """What a stage leaves for the next one: its model; after PPO or DPO, only the policy."""
    model: Any = trainer.model
    if isinstance(model, ActorCritic):
        model = model.policy
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"a {type(model).__name__} cannot be left for the next stage: it needs the methods "
            "save_pretrained(folder) and from_pretrained(folder)"
        )
    return model


def plain(model: Any) -> Any:
    """A model as `save_pretrained` takes it: of one with adapters, a copy that has them merged."""
    is_adapted = isinstance(model, Pretrained) and lora.is_adapted(model)
    return lora.merged_copy(model) if is_adapted else model


def has_begun(folder: Path) -> bool:
    """Whether a stage has saved anything in its folder."""
    return (folder / "checkpoint.pt").exists() or is_finished(folder)


def is_finished(folder: Path) -> bool:
    """Whether a stage has been finished in its folder."""
    return (folder / "finished.json").exists()


def stored_options(folder: Path, name: str) -> dict[str, Any] | None:
    """The options that a stage in a run's folder had; None where there is no record of them.

    Runs that are older than this file have one config.json for all stages.
    """
    for path in (folder / name / "options.json", folder / "config.json"):
        if path.exists():
            return read_json(path)
    return None


def section_of(option: str) -> str:
    """The section of a dotted name: "sft" of sft.max_iters."""
    return option.partition(".")[0]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, to_json(value, indent=2) + "\n")
