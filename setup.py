from setuptools import find_packages, setup

setup(
    name="ta_plugin",
    version="0.1.0",
    description="Exact attention over distinct tokens, distributed, for Megatron-core and DeepSpeed",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ta_plugin", "ta_plugin.*"]),
    package_data={"ta_plugin": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",  # torch.distributed.checkpoint and the data readers
        "rich>=13",  # progress bars and the tables that explain() and the examples print
    ],
    extras_require={
        "megatron": ["megatron-core>=0.16.1"],
        "deepspeed": ["deepspeed>=0.19.8"],
        "examples": ["matplotlib>=3.8", "typer>=0.12"],  # training curves; the command line
        "test": ["pytest>=8", "hypothesis>=6.100", "ruff==0.14.5", "mypy==1.18.2"],
    },
)
