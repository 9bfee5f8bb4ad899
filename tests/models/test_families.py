"""Which checkpoints are refused, by the name of their architecture."""

import pytest

from laddpo.errors import UserError
from laddpo.models.families import FAMILIES, UNSUPPORTED, find_family
from laddpo.models.llada import LLaDAModelLM


def test_llada_is_found_by_its_architecture():
    family = find_family({"architectures": ["LLaDAModelLM"], "model_type": "llada"}, "here")
    assert family.model_class is LLaDAModelLM


def test_the_architecture_decides_and_not_the_model_type():
    moe = find_family({"architectures": ["LLaDAMoEModelLM"], "model_type": "llada"}, "here")
    assert moe.model_class is not LLaDAModelLM
    with pytest.raises(UserError, match=r"here: the architecture is LLaDAVModelLM \(LLaDA-V.*supported: LLaDAModelLM"):
        find_family({"architectures": ["LLaDAVModelLM"], "model_type": "llada"}, "here")


@pytest.mark.parametrize("content", [{}, {"architectures": None}, {"architectures": [], "model_type": "llada"}])
def test_a_config_without_architecture_is_refused(content):
    with pytest.raises(UserError, match=r"\(none\)"):
        find_family(content, "here")


def test_no_architecture_is_both_supported_and_refused():
    assert not FAMILIES.keys() & UNSUPPORTED.keys()
