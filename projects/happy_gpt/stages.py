"""
What a stage leaves behind in the run's folder, and how the next one takes it up.
"""

from mingpt import distributed
from mingpt.model import GPT
from mingpt.run_folder import finished
from mingpt.config import CfgNode as CN
from mingpt.utils import pick_device


def require(work_dir, stage):
    """The state that a stage's trainer ended with; ValueError if it is not finished."""
    if (state := finished(work_dir / stage)) is None:
        raise ValueError(f"the stage {stage} is not finished in {work_dir}: run it first, with --stages={stage}")
    return state


def start_from(config, work_dir, stage, tokenizer):
    """The model that a stage ended with; ValueError if it is not finished."""
    return load_model(config, tokenizer, require(work_dir, stage))


def load_model(config, tokenizer, state):
    """The model of a trainer's state, on the device it trains on."""
    model = GPT(model_config(config, tokenizer))
    # the state of rl may hold a value function beside the policy
    model.load_state_dict({name.removeprefix("policy."): weight for name, weight in state["model"].items()
                           if not name.startswith("value_model.")})
    return model.to(distributed.join(pick_device(config.rl.device))).eval()


def model_config(config, tokenizer, **options):
    """The options of a model with the tokenizer's vocabulary."""
    return CN(**config.model.to_dict() | {"vocab_size": tokenizer.vocab_size} | options)


def trainer_config(section, work_dir, *extras):
    """A section of the options, for its trainer, which knows nothing of the extras."""
    options = {name: value for name, value in section.to_dict().items() if name not in extras}
    return CN(**options, work_dir=str(work_dir))
