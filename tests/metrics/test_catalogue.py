"""The catalogue: complete, light, and the page generated from it."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from clplat.metrics import METRICS, catalogue

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_page_is_what_the_catalogue_says():
    """To renew it: python -c "from clplat.metrics.catalogue import to_markdown as m; print(m(), end='')" """
    assert PAGE.read_text(encoding="utf-8") == catalogue.to_markdown()


def test_reading_the_catalogue_imports_no_torch():
    code = (
        "import sys, clplat.metrics; clplat.metrics.METRICS; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_of_the_contract():
    contract = """average_accuracy average_incremental_accuracy forgetting backward_transfer forward_transfer plasticity
        stability average_anytime_accuracy worst_case_accuracy forget_accuracy retain_accuracy h_mean online_error
        normalized_return initial_dip dormant_fraction effective_rank weight_norm gradient_norm train_seconds
        eval_seconds samples_per_second warmup_seconds first_step_seconds peak_rss_bytes peak_device_bytes
        trainable_parameters stored_bytes train_flops"""
    assert set(contract.split()) <= set(METRICS)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_entries_are_whole(name):
    from clplat.stream import Kind

    info = METRICS[name]
    assert info.summary
    assert info.formula
    assert info.source
    assert set(info.kinds) <= set(Kind)
    of_sets = name.startswith("general_")  # of what no experience learns, whatever its kind
    assert bool(info.kinds) == (info.group == "metrics" and not of_sets)
    assert None in (info.lowest, info.highest) or info.lowest < info.highest


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'summarise'"):
        importlib.import_module("clplat.metrics").summarise  # noqa: B018


MODULES = ["matrix", "unlearning", "membership", "reference", "relearning", "anytime", "adaptation", "online",
           "representation", "tuning", "cost", "returns"]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"clplat.metrics.{module}"))
    assert result.attempted >= 2
    assert result.failed == 0
