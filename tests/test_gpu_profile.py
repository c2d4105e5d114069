"""benchmarks/gpu_profile.py, as far as there is no GPU to profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void dense_ext::(anonymous namespace)::forward_kernel<dense_ext::(anonymous namespace)::Forward<"
            "dense_ext::Arithmetic<dense_ext::BFloat16, false>, 128, true> >(dense_ext::(anonymous namespace)"
            "::ForwardArguments<dense_ext::BFloat16>)",
            "void forward_kernel<Forward<Arithmetic<BFloat16, false>, 128, true> >",
        ),
        ("void at::native::elementwise_kernel<4, at::native::FillFunctor<float> >(int, float)",
         "void elementwise_kernel<4, FillFunctor<float> >"),
        ("merge_moments_kernel", "merge_moments_kernel"),
    ],
)  # fmt: skip
def test_short_names(benchmark_script: Callable[[str], Any], name: str, short: str) -> None:
    assert benchmark_script("gpu_profile").short(name) == short
