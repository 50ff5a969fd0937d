"""The fuzzer's generators, by the part of the library that they call."""

from tests.fuzz_calls import families, files, models, numbers, options, runs, texts  # noqa: F401
