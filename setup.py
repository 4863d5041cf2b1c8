"""The C kernels: a plain shared library, built if there is a compiler; without it torch does their work."""

from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "src/prunella/sparse/csrc").glob("*.c"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "src/prunella/sparse/csrc").glob("*.h"))

setup(
    ext_modules=[
        Extension(
            "prunella.sparse._kernels",
            SOURCES,
            depends=HEADERS,
            extra_compile_args=["-O3", "-std=c11", "-fvisibility=hidden"],
            libraries=["m"],
            optional=True,
        )
    ]
)
