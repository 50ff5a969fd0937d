"""lora.py: adapters on every trunk, in peft's files, and policy, value and reward on one trunk."""

import copy
import json
import logging
import unittest

import torch
from safetensors.torch import load_file
from torch import nn

from mingpt import lora
from mingpt.heads import ActorCritic, RewardModel, ValueModel
from tests.common import TempDirTestCase, tiny_gpt

# The options of `tiny_gpt` for each trunk that there is.
TRUNKS = {
    "gpt2": {},
    "llama": {"architecture": "llama", "n_kv_head": 1, "n_inner": 24},
}

# The linear layers of a block.
LAYERS = {"gpt2": 4, "llama": 7}


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


if __name__ == "__main__":
    unittest.main()
