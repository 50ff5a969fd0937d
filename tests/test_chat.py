"""Conversations: rendered as in transformers, masked exactly, and safe in hostile hands."""

import json
import multiprocessing
import os
import pickle
import re
import sys
import time
import unittest
from functools import cache
from unittest import mock

import torch
import transformers
from hypothesis import example, given, settings, strategies as st

from mingpt import templates
from mingpt.bpe import BPETokenizer
from mingpt.chars import CharTokenizer
from mingpt.chat import CHATML, Chat
from mingpt.datasets import Comparisons, Completions, Prompts, read_jsonl, split_rows
from mingpt.evaluation import sample
from mingpt.rlhf import PPOTrainer, TextReward
from mingpt.templates import Renderer
from tests import tokenizer_fixtures as fixtures
from tests.common import Server, TempDirTestCase, tiny_gpt
from tests.test_gguf import metadata_of, small_llama, tensors_of, write

# SmolLM2's own template, as its file has it.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
# In the manner of Llama 3's: contents are stripped, a date, and a token by its name.
LIKE_LLAMA3 = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + strftime_now("%d %b %Y") + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# In the manner of Qwen's: blocks on lines of their own, a namespace, tools, a refusal, a break.
LIKE_QWEN2 = """{% set ns = namespace(seen=0) %}
{%- if messages[0].role != "system" %}
    {{- "<|im_start|>system\\nYou are Qwen.<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant", "tool"] %}
        {{ raise_exception("Unknown role " + message.role) }}
    {%- endif %}
    {%- if message.content is not string %}{% continue %}{% endif %}
    {%- set ns.seen = ns.seen + 1 %}
    {{- "<|im_start|>" + message.role + "\\n" + message.content }}
    {%- if message.tool_calls %}
        {{- "\\n" + (message.tool_calls | tojson) }}
    {%- endif %}
    {{- "<|im_end|>\\n" }}
    {%- if ns.seen > 50 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}"""
NO_SPECIAL = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# Writes contents side by side, with nothing between them.
BARE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
TEMPLATES = {
    "smollm2": SMOLLM2,
    "chatml": CHATML,
    "like llama3": LIKE_LLAMA3,
    "like qwen2": LIKE_QWEN2,
}
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is 6 x 7?"}
ANSWER = {"role": "assistant", "content": "It's 42, naïvely."}
THANKS = {"role": "user", "content": "  Thanks!\n"}
BYE = {"role": "assistant", "content": "Bye"}
PROMPT = [SYSTEM, QUESTION]
CONVERSATIONS = [
    [QUESTION],
    [SYSTEM, QUESTION],
    [QUESTION, ANSWER],
    [SYSTEM, QUESTION, ANSWER, THANKS],
    [QUESTION, ANSWER, THANKS, BYE],
]


@cache
def theirs(kind):
    """A tokenizer of transformers', with the special tokens of the templates above."""
    tokenizer = fixtures.make("llama3" if kind == "like llama3" else "smollm")
    tokenizer.add_special_tokens(LLAMA3_TOKENS)
    end = "<|eot_id|>" if kind == "like llama3" else "<|im_end|>"
    with fixtures.folder() as folder:
        fixtures.save(tokenizer, folder, eos_token=end, bos_token="<|begin_of_text|>")
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = TEMPLATES[kind]
    return loaded


@cache
def chat(kind="smollm2"):
    """Our Chat, from the files that theirs writes."""
    with fixtures.folder() as folder:
        theirs(kind).save_pretrained(folder)
        return Chat.from_pretrained(folder)


def chat_with(template):
    """A Chat with one of the tokenizers above and any template."""
    return Chat(chat().tokenizer, template)


class TestAsInTransformers(unittest.TestCase):
    def test_texts_and_ids(self):
        for kind in TEMPLATES:
            for messages in CONVERSATIONS:
                for add_generation_prompt in (False, True):
                    with self.subTest(kind, messages=messages, prompt=add_generation_prompt):
                        options = {"add_generation_prompt": add_generation_prompt}
                        ids = chat(kind).encode(messages, **options)
                        expected = theirs(kind).apply_chat_template(
                            messages, tokenize=False, **options
                        )
                        self.assertEqual(chat(kind).decode(ids), expected)
                        expected = theirs(kind).apply_chat_template(
                            messages, return_dict=False, **options
                        )
                        self.assertEqual(ids, expected)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.text(ASSIGNED), min_size=1, max_size=4))
    def test_any_contents(self, contents):
        roles = ("user", "assistant")
        # Leading space of an answer is encoded apart from the text before it: see below.
        messages = [
            {"role": roles[i % 2], "content": content.lstrip() if i % 2 else content}
            for i, content in enumerate(contents)
        ]
        ids = chat().encode(messages)
        self.assertEqual(ids, theirs("smollm2").apply_chat_template(messages, return_dict=False))

    def test_tool_calls_and_missing_contents(self):
        arguments = {"x": [1, None, "é<b>"]}
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        messages = [
            QUESTION,
            {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": None},
        ]
        ids = chat("like qwen2").encode(messages)
        expected = theirs("like qwen2").apply_chat_template(messages, return_dict=False)
        self.assertEqual(ids, expected)

    def test_with_transformers_tokenizer_in_a_chat(self):
        for kind in TEMPLATES:
            with_theirs = Chat(theirs(kind), TEMPLATES[kind])
            for messages in (*CONVERSATIONS, [{"role": "user", "content": "<|im_end|><|eot_id|>"}]):
                expected = chat(kind).encode(messages, add_generation_prompt=True)
                ids = with_theirs.encode(messages, add_generation_prompt=True)
                self.assertEqual(ids, expected)
            self.assertEqual(with_theirs.stop_tokens, chat(kind).stop_tokens)
            self.assertEqual(with_theirs.encode("<|im_end|>"), chat(kind).encode("<|im_end|>"))


class TestMask(unittest.TestCase):
    def answers(self, chat, messages):
        """The text of each run of tokens under the mask."""
        ids, mask = chat.encode(messages, return_mask=True)
        self.assertEqual(ids, chat.encode(messages))
        self.assertEqual(len(ids), len(mask))
        runs, run = [], []
        for i, learned in zip([*ids, 0], [*mask, False], strict=True):
            if learned:
                run.append(i)
            elif run:
                runs.append(chat.decode(run))
                run = []
        return runs

    def test_the_answers_and_their_ends(self):
        messages = [SYSTEM, QUESTION, ANSWER, THANKS, BYE]
        for kind in TEMPLATES:
            end = "<|eot_id|>" if kind == "like llama3" else "<|im_end|>"
            self.assertEqual(
                self.answers(chat(kind), messages),
                [ANSWER["content"] + end, BYE["content"] + end],
            )

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.text(st.sampled_from("a \n<|im_end>\t'1é")), min_size=2, max_size=4))
    def test_any_answers(self, contents):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
        expected = [content + "<|im_end|>" for content in contents[1::2]]
        self.assertEqual(self.answers(chat(), messages), expected)

    def test_a_conversation_without_answers(self):
        self.assertEqual(self.answers(chat(), [SYSTEM, QUESTION]), [])

    def test_an_answer_continues_the_ids_of_its_prompt(self):
        for content in ("Yes", "\n\n  Yes", "", " "):
            answer = {"role": "assistant", "content": content}
            prompt = chat().encode([QUESTION], add_generation_prompt=True)
            ids, mask = chat().encode([QUESTION, answer], return_mask=True)
            self.assertEqual(ids[:len(prompt)], prompt)
            self.assertEqual(mask.index(True), len(prompt))

    def test_a_template_without_special_tokens(self):
        plain = Chat(BPETokenizer.train([fixtures.TRAINING_TEXT], 300), NO_SPECIAL)
        messages = [QUESTION, ANSWER, THANKS, BYE]
        self.assertEqual(self.answers(plain, messages), [" It's 42, naïvely.\n", " Bye\n"])

    def test_a_template_that_changes_what_it_wrote_before(self):
        forgets = (
            "{% for m in messages %}{% if loop.last or m.role == 'user' %}"
            "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
            "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
        messages = [QUESTION, ANSWER, THANKS, BYE]
        self.assertIn(chat().special["<|im_end|>"], chat_with(forgets).encode(messages))
        with self.assertRaisesRegex(ValueError, "changes what it wrote before .* message 1"):
            chat_with(forgets).encode(messages, return_mask=True)

    def test_a_template_without_a_generation_prompt(self):
        template = BARE.split("{% if")[0]
        with self.assertRaisesRegex(ValueError, "does not tell where the answer in message 1"):
            chat_with(template).encode([QUESTION, ANSWER], return_mask=True)


# What somebody would write who wants a special token to get in.
PIECES = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>"),
    *("<|im_", "start|>", "end|>", "<", "|", "|>", ">", "im_start", "im_", "<|", "t|>"),
    *("<|IM_END|>", "<|im_ end|>", "<|im_\nend|>", "<|im_\u200bend|>", "<|im_en\u212a|>"),
    *("\U000f0000", "\U000f0001", "\U00100000", "\ue000", "\ufdd0", "\x00"),
    *("{{ '<|im_end|>' }}", "{% endfor %}", "{#", "\\u003c", "&lt;"),
    *("a", " ", "\n", "é", "e\u0301", "user\n", "assistant"),
]
CONTENTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


class TestHostileContents(unittest.TestCase):
    """No special token gets in through a message."""

    def special_tokens(self, chat, contents, **fields):
        roles = ("user", "assistant")
        messages = [
            {"role": roles[i % 2], "content": content, **fields}
            for i, content in enumerate(contents)
        ]
        ids = chat.encode(messages)
        return chat.decode(ids), [i for i in ids if i in chat.special.values()]

    @settings(max_examples=200, deadline=None)
    @given(st.lists(CONTENTS, min_size=1, max_size=4))
    def test_the_special_tokens_are_the_templates(self, contents):
        for kind in TEMPLATES:
            harmless = ["x"] * len(contents)
            _, expected = self.special_tokens(chat(kind), harmless)
            text, special = self.special_tokens(chat(kind), contents)
            self.assertEqual(special, expected)
            # and the contents are there as they were, though Llama 3's template strips them
            for content in contents:
                self.assertIn(content.strip(), text)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(CONTENTS, min_size=1, max_size=4))
    def test_across_two_messages(self, contents):
        text, special = self.special_tokens(bare(), contents)
        self.assertEqual(text, "".join(contents))
        self.assertEqual(special, [])

    @settings(max_examples=100, deadline=None)
    @given(CONTENTS.filter(len), CONTENTS.filter(len))
    def test_with_the_templates_own_text_around_it(self, one, two):
        _, special = self.special_tokens(around(), [one, two])
        self.assertEqual(special, [])

    def test_a_template_that_changes_contents_into_special_tokens(self):
        for change, content in (
            ("lower", "<|IM_END|>"),
            ("replace(' ', '')", "<|im_ end|>"),
            ("reverse", "<|im_end|>"[::-1]),
            ("urlize | striptags", "<b><|im_end|></b>"),
        ):
            template = f"{{% for m in messages %}}{{{{ m.content | {change} }}}}{{% endfor %}}"
            changes = chat_with(template)
            with self.subTest(change):
                try:
                    _, special = self.special_tokens(changes, [content])
                except ValueError as error:
                    self.assertRegex(str(error), "could be steering the model")
                else:
                    self.assertEqual(special, [])

    def test_in_other_fields_than_the_content(self):
        template = (
            "{% for m in messages %}{{ m.name }}{{ m.parts | tojson }}{{ m.parts[0].text }}"
            "{% endfor %}"
        )
        fields = {"name": "<|im_end|>", "parts": [{"text": "<|im_start|>", "n": [1, True, None]}]}
        text, special = self.special_tokens(chat_with(template), ["a"], **fields)
        self.assertEqual(special, [])
        self.assertIn('[{"text": "<|im_start|>", "n": [1, true, null]}]<|im_start|>', text)

    def test_in_a_key(self):
        for key in ("<|im_end|>", "a b", "", "xEOSx"):
            with self.assertRaisesRegex(ValueError, f"message 0: got the key '{re.escape(key)}'"):
                self.special_tokens(chat_with_words(), ["a"], parts=[{key: 1}])

    def test_in_a_role(self):
        for role in ("<|im_end|>", "a\n<|im_end|>", "im_start", "endoftext", "t|>", "", "use r"):
            with self.subTest(role), self.assertRaisesRegex(ValueError, "message 1 has the role"):
                chat().encode([QUESTION, {"role": role, "content": "a"}])

    @settings(max_examples=200, deadline=None)
    @given(st.one_of(CONTENTS, st.text(st.sampled_from("imendstaroftx_u<|>"), max_size=12)))
    def test_in_any_role(self, role):
        for chat in (roles_as_tokens(), bare()):
            messages = [{"role": role, "content": "a"}, {"role": role, "content": "b"}]
            try:
                ids = chat.encode(messages)
            except ValueError as error:
                self.assertRegex(str(error), "message 0 has the role")
            else:
                self.assertFalse(set(ids) & set(chat.special.values()))

    def test_unusual_roles_are_taken(self):
        for role in ("tool", "moderator"):
            text = chat().decode(chat().encode([QUESTION, {"role": role, "content": "a"}]))
            self.assertIn(f"<|im_start|>{role}\na<|im_end|>", text)

    def test_a_special_token_of_one_character(self):
        text, special = self.special_tokens(chat_with_words(), ["a\u2402b"])
        self.assertEqual(len(special), 2)
        self.assertIn("a\u2402b", text)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.text(st.sampled_from("EOS \u2402\n")), min_size=1, max_size=4))
    @example(["SESES", "SE", "SESE"])
    def test_special_tokens_that_are_words(self, contents):
        _, expected = self.special_tokens(chat_with_words(), ["x"] * len(contents))
        text, special = self.special_tokens(chat_with_words(), contents)
        self.assertEqual(special, expected)
        for content in contents:
            self.assertIn(content, text)

    def test_a_normalized_special_token(self):
        # U+212A, the sign of Kelvin, becomes a K by normalisation.
        tokenizer = fixtures.make("qwen2")
        tokenizer.add_special_tokens([transformers.AddedToken("<OK>", normalized=True)])
        with fixtures.folder() as folder:
            fixtures.save(tokenizer, folder)
            normalizing = Chat(BPETokenizer.from_pretrained(folder), CHATML)
        for content in ("<OK>", "<O\u212a>"):
            _, special = self.special_tokens(normalizing, [content])
            self.assertEqual(len(special), 2)

    def test_as_a_text(self):
        self.assertNotIn(2, chat().encode("<|im_end|>"))


@cache
def chat_with_words():
    """A Chat with special tokens that are a word, a sign, and spaces, or that overlap."""
    tokenizer = fixtures.make("smollm")
    tokenizer.add_special_tokens(["EOS", "\u2402", "   ", "SES"])
    with fixtures.folder() as folder:
        fixtures.save(tokenizer, folder)
        return Chat(BPETokenizer.from_pretrained(folder), CHATML)


@cache
def bare():
    return chat_with(BARE)


@cache
def roles_as_tokens():
    """A Chat whose template makes tokens of the roles, as Phi's does."""
    pieces = "<|im_{{ m.role }}|><|{{ m.role }}|>{{ m.role }}"
    return chat_with(f"{{% for m in messages %}}{pieces}{{% endfor %}}")


@cache
def around():
    """A Chat whose template writes the two ends of a special token around a content."""
    pieces = "<|im_{{ m.content }}end|><|{{ m.content }}|>"
    return chat_with(f"{{% for m in messages %}}{pieces}{{% endfor %}}")


class TestHostileTemplates(unittest.TestCase):
    """A template from a stranger can do nothing but write a text, or fail."""

    def fails(self, template, words):
        stranger = chat_with(template)
        with self.assertRaisesRegex(ValueError, words):
            stranger.encode([QUESTION, ANSWER])

    def test_an_endless_loop(self):
        loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        with mock.patch.object(templates, "SECONDS", 0.5):
            begin = time.monotonic()
            self.fails(loop, "the chat template does not work: it took more than 0.5 seconds")
            self.assertLess(time.monotonic() - begin, 60)

    @unittest.skipUnless(sys.platform == "linux", "the limit is the operating system's")
    def test_a_huge_text(self):
        self.fails("{{ 'a' * 10**9 }}", "MemoryError")
        self.fails("{% set x = [1] * 10**8 %}", "MemoryError")

    def test_a_long_text(self):
        self.fails("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "more than 16777216")

    def test_python_is_out_of_reach(self):
        self.fails("{{ messages.__class__.__mro__ }}", "SecurityError|Undefined")
        self.fails("{{ ''.format.__globals__['x'] }}", "SecurityError|Undefined")
        self.fails("{{ messages.append(1) }}", "SecurityError")
        self.fails("{{ namespace(__class__=1) }}", "SecurityError")
        self.fails("{% set n = namespace() %}{% set n._x = 1 %}", "SecurityError")
        self.fails("{% include 'a' %}", "no loader")

    def test_a_child_that_died_is_replaced(self):
        stranger = chat_with(NO_SPECIAL)
        expected = stranger.encode([QUESTION])
        stranger.renderer.child.kill()
        with self.assertRaisesRegex(ValueError, "does not work"):
            stranger.encode([QUESTION])
        self.assertEqual(stranger.encode([QUESTION]), expected)

    def test_known_templates_need_no_child(self):
        self.assertTrue(Renderer(CHATML).is_known)
        self.assertTrue(Renderer(SMOLLM2).is_known)
        self.assertFalse(Renderer(SMOLLM2 + " ").is_known)

    def test_without_the_limits_that_only_unix_has(self):
        with mock.patch.dict(sys.modules, {"resource": None}):
            templates.limit_memory()
        self.assertEqual(Renderer("{{ 1 + 1 }}")([{}], 0), ["2"])

    def test_a_forked_process_has_a_child_of_its_own(self):
        if "fork" not in multiprocessing.get_all_start_methods():
            self.skipTest("there is no fork")
        stranger = chat_with(NO_SPECIAL)
        expected = stranger.encode([QUESTION])
        context = multiprocessing.get_context("fork")
        queue = context.Queue()

        def in_the_fork():
            queue.put((stranger.encode([QUESTION]), stranger.renderer.child.pid))

        process = context.Process(target=in_the_fork)
        process.start()
        ids, pid = queue.get(timeout=60)
        process.join()
        self.assertEqual(ids, expected)
        self.assertNotEqual(pid, stranger.renderer.child.pid)
        self.assertEqual(stranger.encode([QUESTION]), expected)

    def test_a_chat_travels_to_other_processes(self):
        stranger = chat_with(NO_SPECIAL)
        expected = stranger.encode([QUESTION])
        self.assertEqual(pickle.loads(pickle.dumps(stranger)).encode([QUESTION]), expected)


class TestErrors(unittest.TestCase):
    """They name the template and the message."""

    def test_what_the_template_refuses(self):
        words = "chat template .* fails at message 1, .*'bishop'.*: Unknown role bishop"
        with self.assertRaisesRegex(ValueError, words):
            chat("like qwen2").encode([QUESTION, {"role": "bishop", "content": "a"}, ANSWER])

    def test_a_message_that_lacks_what_the_template_writes(self):
        with self.assertRaisesRegex(ValueError, "message 1, {'role': 'assistant'}: .*content"):
            chat().encode([QUESTION, {"role": "assistant"}, THANKS])

    def test_the_message_is_shown_without_disguise(self):
        broken = chat_with("{{ raise_exception(messages[0].content) }}")
        with self.assertRaises(ValueError) as caught:
            broken.encode([{"role": "user", "content": "<|im_end|>"}])
        self.assertEqual(str(caught.exception).count("<|im_end|>"), 2)

    def test_no_template(self):
        with self.assertRaisesRegex(ValueError, "line 1: "):
            chat_with("{% for").encode([QUESTION])
        with self.assertRaisesRegex(TypeError, "template of type NoneType"):
            chat_with(None)

    def test_no_messages(self):
        for wrong in ([], None, QUESTION, 7):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, "expected a list of one"):
                chat().encode(wrong)
        for wrong in ([7], [{}], [{"content": "a"}], [{"role": 1}]):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, "message 0 is"):
                chat().encode(wrong)

    def test_contents_that_are_no_json(self):
        with self.assertRaisesRegex(ValueError, "message 0: got a Tensor"):
            chat().encode([{"role": "user", "content": torch.tensor(1)}])
        endless = []
        endless.append(endless)
        with self.assertRaisesRegex(ValueError, "message 0: maximum recursion"):
            chat().encode([{"role": "user", "content": endless}])

    def test_a_text_has_no_mask(self):
        with self.assertRaisesRegex(ValueError, "a mask need messages"):
            chat().encode("a", return_mask=True)


class TestLoading(TempDirTestCase):
    def test_every_place_of_a_template(self):
        theirs("chatml").save_pretrained(self.folder)
        config = json.loads((self.folder / "tokenizer_config.json").read_text())
        (self.folder / "chat_template.jinja").unlink(missing_ok=True)
        for in_config in (CHATML, [{"name": "default", "template": CHATML}]):
            config["chat_template"] = in_config
            (self.folder / "tokenizer_config.json").write_text(json.dumps(config))
            self.assertEqual(Chat.from_pretrained(self.folder).template, CHATML)
        (self.folder / "chat_template.jinja").write_text(NO_SPECIAL)
        self.assertEqual(Chat.from_pretrained(self.folder).template, NO_SPECIAL)

    def test_no_template(self):
        BPETokenizer.train([fixtures.TRAINING_TEXT], 300).save_pretrained(self.folder)
        with self.assertRaisesRegex(ValueError, "has no chat template: pass one yourself"):
            Chat.from_pretrained(self.folder)

    def test_saved_and_loaded_by_others_and_by_us(self):
        messages = [QUESTION, ANSWER]
        expected = chat("like llama3").encode(messages)
        chat("like llama3").save_pretrained(self.folder)
        self.assertEqual(Chat.from_pretrained(self.folder).encode(messages), expected)
        loaded = transformers.AutoTokenizer.from_pretrained(self.folder)
        self.assertEqual(loaded.apply_chat_template(messages, return_dict=False), expected)

    def test_stop_tokens(self):
        special = chat("like llama3").special
        self.assertEqual(chat("like llama3").stop_tokens, [special["<|eot_id|>"]])
        theirs("chatml").save_pretrained(self.folder)
        (self.folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
        self.assertEqual(Chat.from_pretrained(self.folder).stop_tokens, [2, 0])
        self.assertEqual(Chat.from_pretrained(self.folder).eot_token, 2)

    def test_a_name_on_the_hub(self):
        with fixtures.folder() as folder:
            theirs("like qwen2").save_pretrained(folder)
            (folder / "config.json").write_text("{}")
            files = {
                f"/a/b/resolve/main/{path.name}": path.read_bytes() for path in folder.iterdir()
            }
        server = self.enterContext(Server(files))
        environment = {"HF_ENDPOINT": server.url, "MINGPT_HOME": str(self.folder)}
        self.enterContext(mock.patch.dict(os.environ, environment))
        loaded = Chat.from_pretrained("a/b")
        self.assertEqual(loaded.encode(PROMPT), chat("like qwen2").encode(PROMPT))
        with self.assertRaisesRegex(ValueError, "the chat template of a/b fails at message 1"):
            loaded.encode([QUESTION, {"role": "bishop", "content": "a"}])

    def test_a_tokenizer_of_characters(self):
        text = "user: Q\nassistant: Yes\n"
        characters = Chat(CharTokenizer(sorted(set(text))), NO_SPECIAL)
        messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Yes"}]
        self.assertEqual(characters.decode(characters.encode(messages)), text)
        self.assertEqual(characters.stop_tokens, [characters.tokenizer.eot_token])

    def test_a_gguf(self):
        theirs_json = json.loads(theirs("smollm2").backend_tokenizer.to_str())
        vocab = chat().tokenizer.vocab
        special = chat().special
        tokens = sorted(vocab, key=vocab.__getitem__)
        model = small_llama(vocab_size=len(tokens))
        metadata = metadata_of(model.config) | {
            "tokenizer.ggml.tokens": ("add_array", tokens),
            "tokenizer.ggml.token_type": ("add_array", [3 if t in special else 1 for t in tokens]),
            "tokenizer.ggml.merges": (
                "add_array",
                [" ".join(merge) for merge in theirs_json["model"]["merges"]],
            ),
            "tokenizer.ggml.eos_token_id": ("add_uint32", special["<|im_end|>"]),
            "tokenizer.ggml.eot_token_id": ("add_uint32", special["<|endoftext|>"]),
            "tokenizer.chat_template": ("add_string", SMOLLM2),
        }
        path = write(self.folder / "x.gguf", metadata, tensors_of(model))
        loaded = Chat.from_pretrained(path)
        self.assertEqual(loaded.encode([SYSTEM, QUESTION]), chat().encode([SYSTEM, QUESTION]))
        self.assertEqual(loaded.stop_tokens, [special["<|im_end|>"], special["<|endoftext|>"]])
        self.assertEqual(BPETokenizer.from_pretrained(path).special, special)

    def test_smollm2(self):
        fixtures.real_smollm2()
        real = Chat.from_pretrained("smollm2")
        self.assertTrue(real.renderer.is_known)
        self.assertEqual(real.stop_tokens, [2])
        ids = real.encode([QUESTION], add_generation_prompt=True)
        text = "<|im_start|>user\nWhat is 6 x 7?<|im_end|>\n<|im_start|>assistant\n"
        self.assertTrue(real.decode(ids).endswith(text))


class TestDatasets(TempDirTestCase):
    def test_demonstrations(self):
        rows = [{"messages": [*PROMPT, ANSWER, THANKS, BYE]}]
        [(x, y)] = Completions(rows, chat(), block_size=200)
        ids, mask = chat().encode(rows[0]["messages"], return_mask=True)
        learned = [i for i, is_learned in zip(ids, mask, strict=True) if is_learned]
        self.assertEqual(y[y >= 0].tolist(), learned)
        self.assertEqual(y[-1], chat().eot_token)  # nothing behind the last answer's end
        self.assertEqual(x.tolist(), ids[:len(x)])

    def test_a_completion_of_messages(self):
        [(x, y)] = Completions([{"prompt": PROMPT, "completion": "Yes"}], chat(), 200)
        [as_messages] = Completions(
            [{"messages": [*PROMPT, {"role": "assistant", "content": "Yes"}]}], chat(), 200
        )
        self.assertEqual((x.tolist(), y.tolist()), tuple(t.tolist() for t in as_messages))

    def test_comparisons(self):
        texts = {"prompt": PROMPT, "chosen": "Yes", "rejected": ["No", "Never"]}
        messages = {
            "prompt": PROMPT,
            "chosen": [{"role": "assistant", "content": "Yes"}],
            "rejected": [[{"role": "assistant", "content": c}] for c in ("No", "Never")],
        }
        [(prompt, completions)] = Comparisons([texts], chat(), 200)
        [(same_prompt, same_completions)] = Comparisons([messages], chat(), 200)
        self.assertEqual(prompt.tolist(), chat().encode(PROMPT, add_generation_prompt=True))
        self.assertEqual(prompt.tolist(), same_prompt.tolist())
        as_lists = [completion.tolist() for completion in completions]
        self.assertEqual(as_lists, [completion.tolist() for completion in same_completions])
        self.assertEqual(chat().decode(as_lists[0]), "Yes<|im_end|>")

    def test_a_comparison_that_was_cut_off(self):
        row = {
            "prompt": PROMPT,
            "chosen": [{"role": "assistant", "content": "Yes"}],
            "rejected": [{"role": "assistant", "content": "No"}],
            "ended": [True, False],
        }
        [(_, completions)] = Comparisons([row], chat(), 200)
        self.assertEqual([chat().decode(c) for c in completions], ["Yes<|im_end|>", "No"])

    def test_an_answer_that_is_none(self):
        for chosen in ([QUESTION], [ANSWER, THANKS]):
            row = {"prompt": PROMPT, "chosen": chosen, "rejected": "No"}
            with self.assertRaisesRegex(ValueError, "row 0 .* expected one message of the assist"):
                Comparisons([row], chat(), 200)
        row = {"prompt": "text", "chosen": [ANSWER], "rejected": "No"}
        with self.assertRaisesRegex(ValueError, "row 0 .* a prompt that is messages"):
            Comparisons([row], chat(), 200)

    def test_prompts(self):
        ids = chat().encode(PROMPT, add_generation_prompt=True)
        rows = [PROMPT, {"prompt": PROMPT}, {"messages": PROMPT}]
        for row in rows:
            self.assertEqual(Prompts([row], chat()).ids[0].tolist(), ids)
        with self.assertRaisesRegex(TypeError, "prompts is one list of messages"):
            Prompts(PROMPT, chat())

    def test_rows_without_answers_and_without_a_chat(self):
        with self.assertRaisesRegex(ValueError, "row 0 has no message of the assistant"):
            Completions([{"messages": PROMPT}], chat(), 200)
        with self.assertRaisesRegex(ValueError, "row 0 has messages.* pass a Chat"):
            Completions([{"messages": PROMPT}], chat().tokenizer, 200)
        with self.assertRaisesRegex(ValueError, "row 1: message 0 has the role"):
            wrong = {"messages": [{"role": "<|im_end|>", "content": "a"}, ANSWER]}
            Completions([{"messages": [QUESTION, ANSWER]}, wrong], chat(), 200)

    def test_files(self):
        rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [THANKS, BYE]}]
        path = self.folder / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        self.assertEqual(read_jsonl(path, "messages"), rows)
        self.assertEqual(sum(map(len, split_rows(rows, "messages").values())), 2)
        with self.assertRaisesRegex(ValueError, "line 1"):
            read_jsonl(path, "prompt")

    def test_ppo_on_messages(self):
        seen = []

        def reward(completions, prompts):
            seen.extend(zip(prompts, completions, strict=True))
            return [1.0] * len(completions)

        config = PPOTrainer.get_default_config()
        config.merge_from_dict({"max_iters": 1, "batch_size": 2, "max_new_tokens": 4})
        policy = tiny_gpt(vocab_size=chat().tokenizer.vocab_size, block_size=128)
        trainer = PPOTrainer(
            config, policy, TextReward(reward, chat()), [PROMPT] * 2, tokenizer=chat()
        )
        trainer.run()
        self.assertEqual(trainer.stop_token, chat().eot_token)
        prompt, completion = seen[0]
        self.assertIn("What is 6 x 7?", prompt)
        self.assertNotIn("<|im_end|>", completion)

    def test_samples_of_messages(self):
        policy = tiny_gpt(vocab_size=chat().tokenizer.vocab_size, block_size=128)
        samples = sample(policy, [PROMPT], 2, tokenizer=chat(), max_new_tokens=4)
        self.assertEqual(len(samples.texts), 2)
