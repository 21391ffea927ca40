from __future__ import annotations

import pytest

from fibopolicy.errors import UserError
from fibopolicy.utils.registry import Registry


def test_an_entry_is_found_by_its_name() -> None:
    sizes: Registry[int] = Registry("size")
    assert sizes.register("small")(3) == 3
    assert sizes["small"] == 3
    assert sizes.names() == ("small",)


def test_a_lazy_entry_is_imported_at_its_first_use() -> None:
    functions: Registry[object] = Registry(
        "function", {"sqrt": "math:sqrt", "gone": "no_such_module:f"}
    )
    import math

    assert functions["sqrt"] is math.sqrt
    assert "gone" in functions
    with pytest.raises(ModuleNotFoundError):
        functions["gone"]


def test_an_unknown_name_suggests_the_nearest() -> None:
    sizes: Registry[int] = Registry("size", {"small": "math:pi"})
    with pytest.raises(UserError, match="unknown size 'smal': did you mean 'small'"):
        sizes["smal"]
