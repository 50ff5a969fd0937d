"""lora.py: adapters on every trunk, in peft's files, and policy, value and reward on one trunk."""

import contextlib
import copy
import gc
import json
import logging
import math
import re
import types
import unittest

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from mingpt import lora
from mingpt.chars import CharTokenizer
from mingpt.datasets import Comparisons
from mingpt.heads import ActorCritic, RewardModel, ValueModel
from mingpt.model import GPT
from mingpt.rlhf import DPOLoss, PPOTrainer, comparison_loss
from mingpt.stages import plain
from mingpt.trainer import Trainer
from mingpt.utils import set_seed
from tests.common import ROOT, TempDirTestCase, tiny_gpt
from tests.test_distributed import TwoProcessesTestCase

# The options of `tiny_gpt` for each trunk that there is.
TRUNKS = {
    "gpt2": {},
    "llama": {"architecture": "llama", "n_kv_head": 1, "n_inner": 24},
}

# The linear layers of a block.
LAYERS = {"gpt2": 4, "llama": 7}

TOKENIZER = CharTokenizer("abcdefghij")  # the end of a text is 10


def setUpModule():
    logging.getLogger("mingpt").setLevel(logging.WARNING)


def tiny(trunk="gpt2", **options):
    """A small model on one of the TRUNKS."""
    return tiny_gpt(**TRUNKS[trunk], **options)


def teach(model, seed=1):
    """Pretend that a model has learned something: random numbers for all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def adapted(trunk="gpt2", rank=4, **options):
    """A small model with an adapter that has learned something."""
    model = tiny(trunk, **options)
    lora.add(model, rank=rank)
    return teach(model)


def random_ids(rows=3, length=8):
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(2))


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


class TestAdapters(unittest.TestCase):
    """One adapter or several on a language model."""

    def test_a_fresh_one_changes_nothing(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                model = tiny(trunk)
                before = model(random_ids())[0]
                lora.add(model)
                self.assertTrue(torch.equal(model(random_ids())[0], before))

    def test_off_is_the_base_bit_for_bit(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                before = tiny(trunk)(random_ids())[0]
                model = adapted(trunk)
                self.assertFalse(torch.allclose(model(random_ids())[0], before, atol=1e-2))
                with lora.disabled(model):
                    self.assertTrue(torch.equal(model(random_ids())[0], before))

    def test_every_layer_computes_the_papers_equation(self):
        for trunk in TRUNKS:
            model = tiny(trunk)
            lora.add(model, rank=3, alpha=12)
            teach(model)
            adapter = model.transformer.adapters.default
            self.assertEqual(len(adapter.updates), LAYERS[trunk] * model.config.n_layer)
            for name, update in adapter.updates.items():
                with self.subTest(name):
                    layer = model.transformer.get_submodule(name)
                    x = torch.randn(2, 5, layer.in_features)
                    weight = layer.weight + 12 / 3 * update.B @ update.A
                    expected = nn.functional.linear(x, weight, layer.bias)
                    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)

    def test_nothing_else_is_trained(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                model = adapted(trunk)
                model(random_ids(), random_ids())[1].backward()
                got_gradients = {n for n, p in model.named_parameters() if p.grad is not None}
                self.assertEqual(got_gradients, trained_names(model))
                self.assertTrue(all(".adapters.default." in name for name in got_gradients))

    def test_the_names_of_the_base_stay(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                names = tiny(trunk).state_dict().keys()
                with_adapter = adapted(trunk).state_dict().keys()
                self.assertEqual(names - with_adapter, set())

    def test_the_numbers_are_counted_and_logged(self):
        model = tiny()
        with self.assertLogs("mingpt", "INFO") as logs:
            counted = lora.add(model, rank=2)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # r (in + out) for c_attn, two c_proj and c_fc, in two layers
        expected = 2 * 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))
        self.assertEqual((counted, trained), (expected, expected))
        self.assertIn("1,024 numbers in 8 layers", logs.output[0])

    def test_layers_by_the_ends_of_their_names(self):
        model = tiny()
        lora.add(model, layers=["c_fc", "attn.c_proj"])
        expected = [f"h.{i}.{end}" for i in (0, 1) for end in ("attn.c_proj", "mlp.c_fc")]
        self.assertEqual(list(model.transformer.adapters.default.updates), expected)

    def test_layers_that_do_not_exist(self):
        with self.assertRaisesRegex(ValueError, "'q_proj'; they end with c_attn, c_fc, c_proj"):
            lora.add(tiny(), layers=["q_proj"])
        with self.assertRaisesRegex(ValueError, "layers is empty"):
            lora.add(tiny(), layers=[])

    def test_options_out_of_range(self):
        wrong = {"rank": 0, "alpha": 0, "dropout": 1.0, "name": "a.b"}
        for option, value in wrong.items():
            with self.subTest(option), self.assertRaisesRegex(ValueError, f"{option}="):
                lora.add(tiny(), **{option: value})

    def test_other_models(self):
        with self.assertRaisesRegex(TypeError, "for a GPT, a RewardModel or a ValueModel"):
            lora.add(nn.Linear(2, 2))

    def test_merged_it_computes_the_same(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                model = adapted(trunk)
                expected = model(random_ids())[0]
                lora.merge(model)
                error = (model(random_ids())[0] - expected).abs().max()
                self.assertLessEqual(error, 1e-5 * expected.abs().max())

    def test_merged_it_is_an_ordinary_model(self):
        model = adapted()
        lora.merge(model)
        self.assertEqual(model.state_dict().keys(), tiny().state_dict().keys())
        self.assertEqual(trained_names(model), set(dict(model.named_parameters())))
        self.assertFalse(model.transformer.h[0].attn.c_attn._forward_hooks)

    def test_a_merged_copy_leaves_the_model_as_it_is(self):
        model = adapted()
        expected = model(random_ids())[0]
        plain = lora.merged_copy(model)
        self.assertTrue(torch.equal(model(random_ids())[0], expected))
        torch.testing.assert_close(plain(random_ids())[0], expected, atol=1e-4, rtol=1e-4)

    def test_several_on_one_model(self):
        model = adapted()
        first = model(random_ids())[0]
        lora.add(model, name="second")
        teach(model, seed=3)
        second = model(random_ids())[0]
        with lora.active(model, "default"):
            self.assertTrue(torch.equal(model(random_ids())[0], first))
        self.assertTrue(torch.equal(model(random_ids())[0], second))
        self.assertFalse(torch.allclose(first, second, atol=1e-2))
        self.assertTrue(all(".adapters.second." in name for name in trained_names(model)))

    def test_names_that_are_taken_or_unknown(self):
        model = adapted()
        with self.assertRaisesRegex(ValueError, "name='default' is taken"):
            lora.add(model)
        with (
            self.assertRaisesRegex(ValueError, r"no adapter 'reward'; the model has \['default'\]"),
            lora.active(model, "reward"),
        ):
            pass

    def test_a_copy_has_adapters_of_its_own(self):
        model = adapted()
        before = model(random_ids())[0]
        other = copy.deepcopy(model)
        with lora.disabled(other):
            self.assertTrue(torch.equal(model(random_ids())[0], before))
        teach(other, seed=5)
        lora.merge(other)
        self.assertTrue(torch.equal(model(random_ids())[0], before))

    def test_generation_reads_with_the_adapter(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                model = adapted(trunk)
                prompts = random_ids(length=4)
                ids, log_probs = model.generate(prompts, 6, do_sample=True, return_log_probs=True)
                expected = model.log_probs(ids)[:, 3:]
                torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)

    def test_dropout_is_of_the_adapters_input_and_in_training_only(self):
        model = tiny()
        lora.add(model, dropout=0.5)
        teach(model)
        self.assertTrue(torch.equal(model(random_ids())[0], model(random_ids())[0]))
        model.train()
        self.assertFalse(torch.equal(model(random_ids())[0], model(random_ids())[0]))
        with lora.disabled(model):
            self.assertTrue(torch.equal(model(random_ids())[0], model(random_ids())[0]))

    def test_over_half_precision_adapters_are_fp32(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                model = tiny(trunk).bfloat16()
                lora.add(model, rank=4)
                teach(model)
                dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
                self.assertEqual(dtypes, {torch.float32})
                logits, loss = model(random_ids(), random_ids())
                self.assertEqual(logits.dtype, torch.bfloat16)
                loss.backward()
                expected = adapted(trunk)(random_ids())[0]
                torch.testing.assert_close(logits.float(), expected, atol=0.5, rtol=0.1)

    def test_saving_is_refused(self):
        model = adapted()
        for name, each in {"policy": model, "value": ValueModel.on(model)}.items():
            with (
                self.subTest(name),
                self.assertRaisesRegex(ValueError, r"has adapters.*lora.merge\(model\) first"),
            ):
                each.save_pretrained("never")


class TestPeft(TempDirTestCase):
    """Our adapters in `peft`, over transformers' models, and peft's here."""

    def setUp(self):
        super().setUp()
        import peft
        import transformers

        self.peft, self.transformers = peft, transformers

    def theirs(self, model, kind="AutoModelForCausalLM"):
        """The base of a model, as transformers loads it."""
        with lora.disabled(model):
            plain = lora.merged_copy(model)
        plain.save_pretrained(self.folder / "base")
        return getattr(self.transformers, kind).from_pretrained(self.folder / "base").eval()

    def their_adapted(self, base, folder):
        return self.peft.PeftModel.from_pretrained(base, folder).eval()

    def test_ours_there(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                model = adapted(trunk)
                lora.save_pretrained(model, self.folder / "adapter")
                theirs = self.their_adapted(self.theirs(model), self.folder / "adapter")
                logits = theirs(random_ids()).logits
                torch.testing.assert_close(logits, model(random_ids())[0], atol=1e-4, rtol=1e-4)
                targets = theirs.base_model.targeted_module_names
                self.assertEqual(len(targets), len(model.transformer.adapters.default.updates))

    def test_theirs_here(self):
        targets = {"gpt2": ["c_attn", "mlp.c_proj"], "llama": ["q_proj", "down_proj"]}
        for trunk, names in targets.items():
            with self.subTest(trunk):
                base = self.theirs(adapted(trunk))
                config = self.peft.LoraConfig(
                    r=3,
                    lora_alpha=5,
                    target_modules=names,
                    task_type="CAUSAL_LM",
                    fan_in_fan_out=trunk == "gpt2",
                    init_lora_weights=False,  # B is not zero
                )
                theirs = self.peft.get_peft_model(base, config).eval()
                theirs.save_pretrained(self.folder / "adapter")
                model = tiny(trunk)
                counted = lora.load(model, self.folder / "adapter")
                logits = theirs(random_ids()).logits
                torch.testing.assert_close(model(random_ids())[0], logits, atol=1e-4, rtol=1e-4)
                self.assertEqual(counted, theirs.get_nb_trainable_parameters()[0])
                # and back again
                lora.save_pretrained(model, self.folder / "back")
                with theirs.disable_adapter():
                    base_logits = theirs(random_ids()).logits
                again = self.their_adapted(self.theirs(model), self.folder / "back")
                torch.testing.assert_close(again(random_ids()).logits, logits, atol=1e-4, rtol=0)
                self.assertFalse(torch.allclose(base_logits, logits, atol=1e-2))

    def test_the_files_are_as_theirs(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                model = adapted(trunk)
                lora.save_pretrained(model, self.folder / "ours")
                theirs = self.their_adapted(self.theirs(model), self.folder / "ours")
                theirs.save_pretrained(self.folder / "theirs")
                tensors = [
                    load_file(self.folder / side / "adapter_model.safetensors")
                    for side in ("ours", "theirs")
                ]
                torch.testing.assert_close(*tensors, atol=0, rtol=0)

    def test_reward_models(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                model = RewardModel.from_gpt(tiny(trunk))
                lora.add(model, rank=4)
                teach(model)
                lora.save_pretrained(model, self.folder / "adapter")
                base = self.theirs(model, "AutoModelForSequenceClassification")
                theirs = self.their_adapted(base, self.folder / "adapter")
                rewards = theirs(random_ids()[:1]).logits[0]
                expected = model(random_ids()[:1]) - model.head.bias
                torch.testing.assert_close(rewards, expected, atol=1e-4, rtol=1e-4)

    def test_what_ours_do_not_do_is_refused_by_name(self):
        lora.save_pretrained(adapted(), self.folder)
        file = self.folder / "adapter_config.json"
        options = json.loads(file.read_text())
        wrong = {
            "use_dora": True,
            "use_rslora": True,
            "bias": "all",
            "rank_pattern": {"c_attn": 2},
            "peft_type": "IA3",
            "init_lora_weights": "pissa",
            "something_new": 3,
        }
        for name, value in wrong.items():
            with self.subTest(name):
                file.write_text(json.dumps(options | {name: value}))
                with self.assertRaisesRegex(ValueError, f"adapter_config.json.*{name}="):
                    lora.load(tiny(), self.folder)

    def test_damaged_numbers(self):
        lora.save_pretrained(adapted(), self.folder)
        file = self.folder / "adapter_config.json"
        options = json.loads(file.read_text())
        wrong = {"r": "four", "lora_alpha": -1, "lora_dropout": None}
        for name, value in wrong.items():
            with self.subTest(name):
                file.write_text(json.dumps(options | {name: value}))
                with self.assertRaisesRegex(ValueError, f"is damaged: .*={value!r}"):
                    lora.load(tiny(), self.folder)
        file.write_text(json.dumps(options | {"r": 10**12}))
        with self.assertRaisesRegex(ValueError, "of shape .4, 16., and r=1000000000000"):
            lora.load(tiny(), self.folder)

    def test_an_adapter_of_another_model(self):
        lora.save_pretrained(adapted(), self.folder)
        with self.assertRaisesRegex(ValueError, "unexpected.*h.0.attn"):
            lora.load(adapted("llama"), self.folder, name="second")
        with self.assertRaisesRegex(ValueError, "expected floats of shape"):
            lora.load(tiny(n_embd=32), self.folder)
        with self.assertRaisesRegex(ValueError, "unexpected.*h.1.attn.c_attn"):
            lora.load(tiny(n_layer=1), self.folder)

    def test_files_that_are_missing_or_damaged(self):
        with self.assertRaisesRegex(ValueError, "adapter_config.json is no file"):
            lora.load(tiny(), self.folder)
        lora.save_pretrained(adapted(), self.folder)
        file = self.folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
        with self.assertRaisesRegex(ValueError, "adapter_model.safetensors cannot be loaded"):
            lora.load(tiny(), self.folder)
        file.unlink()
        with self.assertRaisesRegex(ValueError, "has no adapter: neither"):
            lora.load(tiny(), self.folder)

    def test_a_model_without_adapters(self):
        with self.assertRaisesRegex(ValueError, r"no adapter on: lora.add\(model\)"):
            lora.save_pretrained(tiny(), self.folder)


class TestOnOneTrunk(TempDirTestCase):
    """Reward models and value functions on a policy's trunk."""

    def test_each_computes_as_a_model_of_its_own(self):
        for trunk in TRUNKS:
            policy = adapted(trunk)
            before = policy(random_ids())[0]
            for kind in (ValueModel, RewardModel):
                with self.subTest(trunk, kind=kind.__name__):
                    model = teach(kind.on(policy), seed=7)
                    own = kind.from_gpt(model)  # which has the adapter merged
                    found, expected = model(random_ids()), own(random_ids())
                    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
                    # and the policy computes what it did
                    self.assertTrue(torch.equal(policy(random_ids())[0], before))

    def test_gradients_are_those_of_a_model_of_its_own(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                policy = adapted(trunk)
                model = teach(ValueModel.on(policy), seed=7)
                own = ValueModel.from_gpt(lora.merged_copy(model))  # with the adapter merged ...
                own.transformer.load_state_dict(tiny(trunk).transformer.state_dict())
                lora.add(own, rank=4)  # ... and then beside the base again
                adapter = own.transformer.adapters.default
                adapter.load_state_dict(model.transformer.adapter.state_dict())
                for each in (model, own):
                    (each(random_ids()) ** 2).sum().backward()
                found = [p.grad for p in model.parameters()]
                expected = [p.grad for p in own.parameters() if p.requires_grad]
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
                self.assertTrue(all(p.grad is None for p in policy.parameters()))

    def test_the_trunk_is_registered_once(self):
        policy = adapted()
        value = ValueModel.on(policy)
        actor_critic = ActorCritic(policy, value)
        embeddings = [n for n in actor_critic.state_dict() if n.endswith("wte.weight")]
        self.assertEqual(embeddings, ["policy.transformer.wte.weight"])
        trained = trained_names(actor_critic)
        of_value = {f"value_model.{name}" for name in dict(value.named_parameters())}
        of_policy = {f"policy.{name}" for name in trained_names(policy)}
        self.assertEqual(trained, of_value | of_policy)

    def test_it_starts_as_the_adapter_that_is_on(self):
        policy = adapted()
        hidden = policy.transformer(random_ids())
        value = ValueModel.on(policy)
        self.assertTrue(torch.equal(value.transformer(random_ids()), hidden))
        self.assertFalse(value(random_ids()).any())  # the head is new
        teach(value)
        self.assertTrue(torch.equal(policy.transformer(random_ids()), hidden))

    def test_options_start_it_afresh(self):
        policy = adapted()
        value = ValueModel.on(policy, rank=2)
        with lora.disabled(policy):
            hidden = policy.transformer(random_ids())
        self.assertTrue(torch.equal(value.transformer(random_ids()), hidden))
        self.assertEqual((value.transformer.adapter.rank, value.transformer.adapter.alpha), (2, 16))

    def test_a_value_function_may_start_as_the_reward_model(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                reward = teach(RewardModel.on(adapted(trunk)))
                value = ValueModel.on(reward)
                self.assertTrue(torch.equal(value(random_ids())[:, -1], reward(random_ids())))
                rewards = reward(random_ids())
                teach(value, seed=9)
                self.assertTrue(torch.equal(reward(random_ids()), rewards))

    def test_on_a_policy_without_adapters(self):
        policy = tiny()
        before = policy(random_ids())[0]
        reward = teach(RewardModel.on(policy))
        self.assertEqual(trained_names(policy), set())
        self.assertTrue(torch.equal(policy(random_ids())[0], before))
        self.assertTrue(reward(random_ids()).any())

    def test_a_policy_that_others_stand_on_can_be_saved(self):
        policy = tiny()
        teach(RewardModel.on(policy))
        policy.save_pretrained(self.folder)
        logits = GPT.from_pretrained(self.folder)(random_ids())[0]
        self.assertTrue(torch.equal(logits, policy(random_ids())[0]))

    def test_they_are_found_by_name(self):
        policy = adapted()
        value = teach(ValueModel.on(policy), seed=7)
        with lora.active(policy, "value"):
            hidden = policy.transformer(random_ids())
        self.assertTrue(torch.equal(value.transformer(random_ids()), hidden))
        with lora.disabled(value), lora.disabled(policy):
            self.assertTrue(
                torch.equal(value.transformer(random_ids()), policy.transformer(random_ids()))
            )

    def test_each_has_its_own_mode(self):
        policy = adapted(resid_pdrop=0.5)
        value = teach(ValueModel.on(policy))
        quiet = value(random_ids())
        policy.train()
        self.assertTrue(torch.equal(value(random_ids()), quiet))
        self.assertFalse(torch.equal(policy(random_ids())[0], policy(random_ids())[0]))
        policy.eval()
        value.train()
        self.assertFalse(torch.equal(value(random_ids()), value(random_ids())))
        self.assertTrue(torch.equal(policy(random_ids())[0], policy(random_ids())[0]))

    def test_saved_and_loaded(self):
        policy = adapted()
        reward = teach(RewardModel.on(policy, rank=3), seed=7)
        lora.save_pretrained(reward, self.folder)
        other = RewardModel.on(adapted())
        lora.load(other, self.folder)
        self.assertTrue(torch.equal(other(random_ids()), reward(random_ids())))
        self.assertEqual(other.transformer.adapter.rank, 3)

    def test_the_policys_adapter_may_not_be_added_to_it(self):
        value = ValueModel.on(adapted())
        for change in (lora.add, lora.merge):
            with self.assertRaisesRegex(ValueError, "stands on another model's trunk"):
                change(value)

    def test_after_a_merge_it_is_of_no_use(self):
        policy = adapted()
        value = ValueModel.on(policy)
        lora.merge(policy)
        with self.assertRaisesRegex(ValueError, "an adapter was merged into it"):
            value(random_ids())


PROMPTS = [[1], [2], [1, 2]]


def ppo_config(**options):
    """The options of a short run of PPO, which learns a lot in each step."""
    config = PPOTrainer.get_default_config()
    config.merge_from_dict(
        {
            "device": "cpu",
            "batch_size": 8,
            "group_size": 2,
            "max_new_tokens": 6,
            "stop_token": 0,
            "max_iters": 3,
            "learning_rate": 1e-2,
            **options,
        }
    )
    return config


def three_adapters(trunk="gpt2"):
    """(policy, reward model, value function) on one trunk; the value function starts as the
    reward model."""
    policy = adapted(trunk)
    reward = teach(RewardModel.on(policy), seed=5)
    return policy, reward, ValueModel.on(reward)


def threes(idx, attention_mask, completion_mask):
    """A reward function: how often 3 was written."""
    return ((idx == 3) & completion_mask).sum(1).float()


def run(trainer):
    """Run a trainer. Its metrics, a row for each iteration, without times."""
    rows = []

    def note(trainer):
        rows.append({k: v for k, v in trainer.metrics.items() if k not in ("tokens/s", "seconds")})

    trainer.add_callback("on_batch_end", note)
    set_seed(1)
    trainer.run()
    return rows


class TestPPO(TempDirTestCase):
    """Policy, value function, reward model and reference on one trunk."""

    def assert_same(self, rows, expected, tolerance=1e-4):
        self.assertEqual(len(rows), len(expected))
        for row, expected_row in zip(rows, expected, strict=True):
            for name, value in expected_row.items():
                with self.subTest(name):
                    delta = tolerance * (1 + abs(value))
                    self.assertAlmostEqual(row[name], value, delta=delta)

    def test_it_learns_as_four_models_do(self):
        for trunk in TRUNKS:
            policy, reward, value = three_adapters(trunk)
            own_policy = adapted(trunk)
            own_reward = RewardModel.from_gpt(reward)
            own_value = ValueModel.from_gpt(tiny(trunk))
            lora.add(own_value, rank=4)
            own_value.head.load_state_dict(value.head.state_dict())
            own_value.transformer.adapters.default.load_state_dict(
                value.transformer.adapter.state_dict()
            )
            set_seed(0)
            trainer = PPOTrainer(ppo_config(), policy, reward, PROMPTS, value)
            set_seed(0)
            own = PPOTrainer(
                ppo_config(),
                own_policy,
                own_reward,
                PROMPTS,
                own_value,
                ref_policy=lora.merged_copy(own_policy),
            )
            with self.subTest(trunk):
                rows = run(trainer)
                self.assert_same(rows, run(own))
                self.assertGreater(rows[-1]["objective/kl"], 0.1)  # so something was learned
                for p, own_p in zip(policy.parameters(), own_policy.parameters(), strict=True):
                    torch.testing.assert_close(p, own_p, atol=1e-3, rtol=0)

    def test_the_ratio_starts_at_one(self):
        for trunk in TRUNKS:
            for precision in ("fp32", "bf16"):
                with self.subTest(trunk, precision=precision):
                    policy, reward, value = three_adapters(trunk)
                    config = ppo_config(precision=precision, max_iters=2)
                    rows = run(PPOTrainer(config, policy, reward, PROMPTS, value))
                    self.assertTrue(all(row["log_prob_error"] < 1e-4 for row in rows))

    def test_by_default_the_value_function_stands_on_the_policys_trunk(self):
        policy = adapted()
        trainer = PPOTrainer(ppo_config(), policy, threes, PROMPTS)
        self.assertIs(trainer.model.value_model.transformer.trunk, policy.transformer)

    def test_a_fresh_adapters_reference_is_the_base(self):
        policy = tiny()
        before = policy(random_ids())[0]
        lora.add(policy)
        trainer = PPOTrainer(ppo_config(), policy, threes, PROMPTS)
        self.assertIsNone(trainer.ref_policy.transformer.adapter)
        run(trainer)
        self.assertTrue(torch.equal(trainer.ref_policy(random_ids())[0], before))
        self.assertFalse(torch.equal(policy(random_ids())[0], before))

    def test_the_reference_is_the_policy_as_it_was(self):
        policy = adapted()
        before = policy(random_ids())[0]
        trainer = PPOTrainer(ppo_config(), policy, threes, PROMPTS)
        rows = run(trainer)
        self.assertAlmostEqual(rows[0]["objective/kl"], 0.0, delta=1e-5)
        self.assertTrue(torch.equal(trainer.ref_policy(random_ids())[0], before))
        with lora.active(policy, "reference"):
            self.assertTrue(torch.equal(policy(random_ids())[0], before))

    def test_nothing_else_changes(self):
        policy, reward, value = three_adapters()
        base = lora.merged_copy(tiny()).state_dict()
        rewards = reward(random_ids())
        run(PPOTrainer(ppo_config(), policy, reward, PROMPTS, value))
        for name, x in base.items():
            self.assertTrue(torch.equal(policy.state_dict()[name], x), name)
        self.assertTrue(torch.equal(reward(random_ids()), rewards))

    def test_every_algorithm_and_a_head_on_the_trunk(self):
        cases = {"rloo": {}, "grpo": {}, "reinforce": {}, "ppo": {"shared_trunk": True}}
        for algorithm, options in cases.items():
            with self.subTest(algorithm):
                config = ppo_config(algorithm=algorithm, max_iters=1, **options)
                policy = adapted()
                before = policy(random_ids())[0]
                rows = run(PPOTrainer(config, policy, threes, PROMPTS))
                self.assertLess(rows[0]["log_prob_error"], 1e-4)
                self.assertFalse(torch.equal(policy(random_ids())[0], before))

    def test_the_example_in_rlhf_md(self):
        page = (ROOT / "RLHF.md").read_text(encoding="utf-8")
        [code] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        self.enterContext(contextlib.chdir(self.folder))
        small = tiny(vocab_size=50257, block_size=64)
        small.save_pretrained("small")
        self.assertIn('"gpt2"', code)
        code = code.replace('"gpt2"', '"small"')
        names = {"__name__": "__main__"}
        exec(compile(code, "RLHF.md", "exec", dont_inherit=True), names)
        merged = GPT.from_pretrained("out/model")
        lora.load(small, "out/adapter")
        found, expected = small(random_ids())[0], merged(random_ids())[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        self.assertGreater(abs(names["trainer"].metrics["objective/kl"]), 1e-6)

    def test_a_step_by_turns_is_that_of_both_at_once(self):
        for precision in ("fp32", "bf16"):
            found = {}
            for take_turns in (True, False):
                policy, reward, value = three_adapters()
                config = ppo_config(precision=precision, micro_batch_size=4)
                trainer = PPOTrainer(config, policy, reward, PROMPTS, value)
                self.assertTrue(trainer.take_turns)
                trainer.take_turns = take_turns
                set_seed(0)
                trainer.model.eval()
                rollout = trainer.rollout(*next(trainer.batches()))
                rollout.returns += 1.0
                trainer.minibatch_step(rollout)
                found[take_turns] = [p.grad for p in trainer.model.parameters()]
            with self.subTest(precision):
                tolerance = 1e-6 if precision == "fp32" else 1e-2
                torch.testing.assert_close(
                    found[True], found[False], atol=tolerance, rtol=tolerance
                )

    def test_it_holds_one_set_of_weights(self):
        options = {"n_embd": 64, "vocab_size": 500}
        alone = tiny(**options)
        lora.add(alone, rank=2)
        data = TensorDataset(random_ids(8), random_ids(8))
        alone = Trainer(trainer_config(), alone, data)
        policy = tiny(**options)
        lora.add(policy, rank=2)
        reward = RewardModel.on(policy)
        trainer = PPOTrainer(ppo_config(), policy, reward, PROMPTS)
        self.assertLess(held([trainer, reward]), 1.3 * held([alone]))

    def test_it_keeps_little_more_for_the_backward_pass_than_training_the_policy_does(self):
        policy, reward, value = three_adapters()
        trainer = PPOTrainer(ppo_config(), policy, reward, PROMPTS, value)
        trainer.model.eval()
        rollout = trainer.rollout(*next(trainer.batches()))
        model = adapted()
        alone = most_kept(lambda: model(rollout.idx, rollout.idx)[1].backward())
        kept = most_kept(lambda: trainer.minibatch_step(rollout))
        self.assertLess(kept, 1.3 * alone)
        trainer.take_turns = False
        self.assertGreater(most_kept(lambda: trainer.minibatch_step(rollout)), 1.5 * alone)

    def test_the_learning_rate_of_the_value_function(self):
        policy, reward, value = three_adapters()
        trainer = PPOTrainer(ppo_config(value_lr_ratio=3.0), policy, reward, PROMPTS, value)
        groups = trainer.optimizer.param_groups
        found = {id(p): group.get("lr_ratio", 1.0) for group in groups for p in group["params"]}
        for p in policy.parameters():
            self.assertEqual(found.get(id(p)), 1.0 if p.requires_grad else None)
        self.assertEqual({found[id(p)] for p in value.parameters()}, {3.0})


def most_kept(function):
    """The most bytes of activations that are kept for a backward pass during a function."""
    bytes_now = [0]
    most = [0]

    class Kept:
        def __init__(self, x):
            self.x = x
            self.nbytes = 0 if isinstance(x, nn.Parameter) or x.is_leaf else x.nbytes
            bytes_now[0] += self.nbytes
            most[0] = max(most[0], bytes_now[0])

        def __del__(self):
            bytes_now[0] -= self.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        function()
    return most[0]


def held(roots):
    """Bytes of all numbers that some objects hold, directly or not; those of a storage once."""
    storages = {}
    seen = set()
    stack = list(roots)
    while stack:
        x = stack.pop()
        if id(x) in seen or isinstance(x, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        stack += gc.get_referents(x)
    return sum(storages.values())


def trainer_config(**options):
    config = Trainer.get_default_config()
    config.merge_from_dict(
        {"device": "cpu", "batch_size": 4, "max_iters": 4, "learning_rate": 1e-2, **options}
    )
    return config


class TestCheckpoints(TempDirTestCase):
    def ppo(self, policy=None, **options):
        """A PPOTrainer with three adapters on a policy's trunk."""
        policy = policy or adapted()
        reward = teach(RewardModel.on(policy), seed=5)
        set_seed(0)
        config = ppo_config(work_dir=str(self.folder / "run"), **options)
        return PPOTrainer(config, policy, reward, PROMPTS, ValueModel.on(reward))

    def checkpoint(self):
        return torch.load(self.folder / "run" / "checkpoint.pt", weights_only=True)

    def test_they_hold_adapters_and_heads_only(self):
        trainer = self.ppo(max_iters=1)
        run(trainer)
        state = self.checkpoint()["model"]
        self.assertEqual(state.keys(), trained_names(trainer.model))
        kinds = {name.split(".")[-1] for name in state}
        self.assertEqual(kinds, {"A", "B", "weight", "bias"})
        self.assertEqual(
            {name for name in state if name.endswith(("weight", "bias"))},
            {"value_model.head.weight", "value_model.head.bias"},
        )

    def test_an_interrupted_run_ends_as_an_uninterrupted_one(self):
        uninterrupted = self.ppo(max_iters=4)
        run(uninterrupted)
        expected = self.checkpoint()
        (self.folder / "run" / "checkpoint.pt").unlink()
        run(self.ppo(max_iters=2))
        resumed = self.ppo(max_iters=4)
        resumed.run()
        torch.testing.assert_close(self.checkpoint()["model"], expected["model"], atol=0, rtol=0)
        self.assertEqual(self.checkpoint()["ref_checksum"], expected["ref_checksum"])

    def test_another_base_is_refused(self):
        run(self.ppo(max_iters=1))
        with self.assertRaisesRegex(ValueError, "a run on other frozen weights"):
            run(self.ppo(adapted(seed=1), max_iters=2))

    def test_a_reward_model_on_another_trunk_is_refused(self):
        work_dir = str(self.folder / "run")

        def trainer(policy, max_iters):
            return Trainer(
                trainer_config(work_dir=work_dir, max_iters=max_iters),
                RewardModel.on(policy),
                comparisons(),
                loss_fn=comparison_loss,
                collate_fn=Comparisons.collate,
            )

        run(trainer(adapted(), 1))
        self.assertTrue(all(".adapter." in n or "head." in n for n in self.checkpoint()["model"]))
        run(trainer(adapted(), 2))
        with self.assertRaisesRegex(ValueError, "a run on other frozen weights"):
            run(trainer(adapted(seed=1), 3))

    def test_a_model_of_which_nothing_is_trained(self):
        with self.assertRaisesRegex(ValueError, "no parameter of the GPT requires gradients"):
            data = TensorDataset(random_ids(8), random_ids(8))
            Trainer(trainer_config(), tiny().requires_grad_(False), data)

    def test_an_adapter_that_comes_after_the_trainer(self):
        model = tiny()
        data = TensorDataset(random_ids(8), random_ids(8))
        trainer = Trainer(trainer_config(), model, data)
        lora.add(model)
        with self.assertRaisesRegex(ValueError, "call lora.add, .* before you make a trainer"):
            trainer.run()

    def test_a_policy_of_which_nothing_is_trained(self):
        policy = tiny()
        reward = RewardModel.on(policy)  # it freezes the policy, which has no adapter
        with self.assertRaisesRegex(ValueError, "no parameter of the GPT requires gradients"):
            PPOTrainer(ppo_config(), policy, reward, PROMPTS)

    def test_a_stage_leaves_the_merged_model(self):
        model = adapted()
        plain(model).save_pretrained(self.folder)
        logits = GPT.from_pretrained(self.folder)(random_ids())[0]
        torch.testing.assert_close(logits, model(random_ids())[0], atol=1e-4, rtol=1e-4)


def comparisons():
    """Pairs in which people choose what is written with `a`."""
    rows = [{"chosen": "a" * (1 + i % 3), "rejected": "b" * (1 + i % 2)} for i in range(16)]
    return Comparisons(rows, TOKENIZER, 12)


class TestLearning(unittest.TestCase):
    """SFT, reward models and DPO with adapters."""

    def test_sft_of_a_language_model(self):
        for trunk in TRUNKS:
            with self.subTest(trunk):
                model = tiny(trunk)
                lora.add(model, rank=4)
                x = random_ids(8)
                data = TensorDataset(x[:, :-1], x[:, 1:])
                rows = run(Trainer(trainer_config(max_iters=30), model, data))
                self.assertLess(rows[-1]["loss"], 0.7 * rows[0]["loss"])

    def learn(self, model, loss_fn, **options):
        return run(
            Trainer(
                trainer_config(max_iters=20, batch_size=16, **options),
                model,
                comparisons(),
                loss_fn=loss_fn,
                collate_fn=Comparisons.collate,
            )
        )

    def test_a_reward_model(self):
        policy = adapted()
        before = policy(random_ids())[0]
        rows = self.learn(RewardModel.on(policy), comparison_loss)
        self.assertLess(rows[-1]["loss"], 0.5 * rows[0]["loss"])
        self.assertTrue(torch.equal(policy(random_ids())[0], before))

    def test_dpo_begins_at_log_2_and_learns(self):
        fresh = tiny()
        lora.add(fresh)
        for name, policy in {"fresh": fresh, "trained": adapted()}.items():
            with self.subTest(name):
                loss_fn = DPOLoss(policy)
                self.assertIs(loss_fn.reference.policy.transformer.trunk, policy.transformer)
                rows = self.learn(ActorCritic(policy), loss_fn)
                self.assertAlmostEqual(rows[0]["loss"], math.log(2), places=5)
                self.assertLess(rows[-1]["loss"], 0.5)

    def test_dpo_learns_as_with_a_reference_of_its_own(self):
        policy, other = adapted(), adapted()
        own = DPOLoss(lora.merged_copy(other))
        rows = self.learn(ActorCritic(policy), DPOLoss(policy))
        expected = self.learn(ActorCritic(other), own)
        for row, expected_row in zip(rows, expected, strict=True):
            self.assertAlmostEqual(row["loss"], expected_row["loss"], delta=1e-4)

    def test_the_reference_has_no_dropout_where_the_policy_has(self):
        policy = adapted(resid_pdrop=0.5)
        loss_fn = DPOLoss(policy, dropout=True)
        policy.train()
        batch = (random_ids(), torch.ones(3, 8, dtype=torch.bool))
        first, _ = loss_fn.reference(*batch)
        self.assertTrue(torch.equal(loss_fn.reference(*batch)[0], first))
        self.assertTrue(policy.transformer.training)

    def test_compiled(self):
        policy = adapted(n_layer=1)
        model = ActorCritic(policy, teach(ValueModel.on(policy), seed=5))
        batch = (random_ids(), torch.ones(3, 8, dtype=torch.bool))
        expected = model(*batch)
        sum(x.sum() for x in expected).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        model.compile(backend="aot_eager")  # traced, and then run by PyTorch
        found = model(*batch)
        sum(x.sum() for x in found).backward()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        compiled_gradients = [p.grad for p in model.parameters() if p.requires_grad]
        torch.testing.assert_close(compiled_gradients, gradients, atol=1e-4, rtol=1e-4)


# What each process runs: a reward model and PPO on one trunk, and what this process has seen.
SCRIPT = """
import json
import sys
from pathlib import Path

from mingpt.heads import RewardModel, ValueModel
from mingpt.rlhf import PPOTrainer, comparison_loss
from mingpt.trainer import Trainer
from mingpt.datasets import Comparisons
from tests.test_lora import PROMPTS, adapted, comparisons, ppo_config, run, trainer_config

_, folder = sys.argv[1:]
policy = adapted()
reward = RewardModel.on(policy)
trainer = Trainer(
    trainer_config(),
    reward,
    comparisons(),
    loss_fn=comparison_loss,
    collate_fn=Comparisons.collate,
)
seen = {"losses": [row["loss"] for row in run(trainer)]}
trainer = PPOTrainer(ppo_config(), policy, reward, PROMPTS, ValueModel.on(reward))
seen["errors"] = [row["log_prob_error"] for row in run(trainer)]
weights = [p.detach().double().abs().sum().item() for p in trainer.model.parameters()]
seen["weights"] = sum(weights)
Path(f"{folder}.rank{trainer.rank}.json").write_text(json.dumps(seen))
"""


class TestTwoProcesses(TwoProcessesTestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        (cls.folder / "script.py").write_text(SCRIPT)
        cls.two = cls.train(2, "adapters", "two")
        [cls.one] = cls.train(1, "adapters", "one")

    def test_both_have_the_same_weights(self):
        self.assertEqual(self.two[0]["weights"], self.two[1]["weights"])

    def test_a_reward_model_learns_as_in_one(self):
        losses = zip(self.two[0]["losses"], self.one["losses"], strict=True)
        for found, expected in losses:
            self.assertAlmostEqual(found, expected, delta=1e-5)

    def test_the_ratio_starts_at_one(self):
        for end in (*self.two, self.one):
            self.assertTrue(all(error < 1e-4 for error in end["errors"]))


if __name__ == "__main__":
    unittest.main()
