"""What pyproject.toml cannot say: packages from two roots, and the entry points.

The built-in methods stand in the same entry-point group that any other distribution may use.

A wheel is pure Python and carries the native sources, which are compiled where it is installed. KECORE_BUILD_NATIVE=1
compiles them now instead; that takes torch at build time (``pip install --no-build-isolation``), and the wheel then
serves one platform, every Python from 3.10 on and every torch from 2.10 on.
"""

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

METHODS = [
    "rome = kecore_methods.locate.rome:Rome",
    "memit = kecore_methods.locate.memit:Memit",
    "pmet = kecore_methods.locate.pmet:Pmet",
    "rect = kecore_methods.locate.rect:Rect",
    "prune = kecore_methods.locate.prune:Prune",
    "encore = kecore_methods.locate.encore:Encore",
    "ote-se = kecore_methods.locate.ote_se:OteSe",
    "emmet = kecore_methods.locate.emmet:Emmet",
    "alphaedit = kecore_methods.locate.alphaedit:AlphaEdit",
    "sphere = kecore_methods.locate.sphere:Sphere",
    "nas = kecore_methods.locate.nas:Nas",
    "evoedit = kecore_methods.locate.evoedit:EvoEdit",
    "rlsedit = kecore_methods.locate.rlsedit:RlsEdit",
    "betaedit = kecore_methods.locate.betaedit:BetaEdit",
    "lyaplock = kecore_methods.locate.lyaplock:LyapLock",
    "memit-fe = kecore_methods.locate.memit_fe:MemitFE",
    "eamet = kecore_methods.locate.eamet:Eamet",
    "simie = kecore_methods.locate.simie:SimIE",
    "kn = kecore_methods.locate.kn:Kn",
    "ultraedit = kecore_methods.locate.ultraedit:UltraEdit",
    "stableedit = kecore_methods.locate.stableedit:StableEdit",
    "ft-l = kecore_methods.finetune.ft:FtL",
    "ft-m = kecore_methods.finetune.ft:FtM",
    "locft-bf = kecore_methods.finetune.locft:LocFtBf",
    "lora = kecore_methods.finetune.lora:Lora",
    "adalora = kecore_methods.finetune.lora:AdaLora",
    "qlora = kecore_methods.finetune.qlora:QLora",
    "dpo = kecore_methods.finetune.dpo:Dpo",
    "grace = kecore_methods.memory.grace:Grace",
    "wise = kecore_methods.memory.wise:Wise",
    "neuraldb = kecore_methods.memory.neuraldb:NeuralDb",
    "calinet = kecore_methods.memory.calinet:CaliNet",
    "t-patcher = kecore_methods.memory.t_patcher:TPatcher",
    "melo = kecore_methods.memory.melo:Melo",
    "serac = kecore_methods.memory.serac:Serac",
    "defer = kecore_methods.memory.defer:Defer",
    "ice = kecore_methods.prompt.ice:Ice",
    "retrieval = kecore_methods.prompt.retrieval:Retrieval",
    "ike = kecore_methods.prompt.ike:Ike",
    "mello = kecore_methods.prompt.mello:Mello",
    "mend = kecore_methods.meta.mend:Mend",
    "ke = kecore_methods.meta.ke:Ke",
    "malmen = kecore_methods.meta.malmen:Malmen",
]

STAGES = [
    "blue = kecore_methods.locate.blue:Blue",
    "merge = kecore_methods.locate.merge:Merge",
    "nas = kecore_methods.locate.nas:NormAnchor",
    "rect = kecore_methods.locate.rect:LargestChanges",
    "prune = kecore_methods.locate.prune:RestrainedSpectrum",
    "sphere = kecore_methods.locate.sphere:BesidesPrincipalDirections",
    "simie = kecore_methods.locate.simie:SimulatedIdeal",
]

METRICS = [
    "success = kecore_metrics.standard:SUCCESS",
    "magnitude = kecore_metrics.standard:MAGNITUDE",
    "strict-accuracy = kecore_metrics.standard:STRICT_ACCURACY",
    "token-accuracy = kecore_metrics.standard:TOKEN_ACCURACY",
    "perplexity = kecore_metrics.standard:PERPLEXITY",
    "free-generation = kecore_metrics.standard:FREE_GENERATION",
    "stability = kecore_metrics.standard:STABILITY",
    "multi-hop = kecore_metrics.standard:MULTI_HOP",
    "kl = kecore_metrics.standard:DIVERGENCE",
    "opinion = kecore_metrics.standard:OPINION",
    "choice = kecore_metrics.choices:CHOICE",
    "truth-ratio = kecore_metrics.choices:TRUTH_RATIO",
    "fluency = kecore_metrics.texts:FLUENCY",
    "consistency = kecore_metrics.texts:CONSISTENCY",
    "rouge = kecore_metrics.texts:ROUGE",
    "bertscore = kecore_metrics.texts:BERTSCORE",
    "judge = kecore_analysis.judge:JUDGE",
]

DATASETS = [
    "kecore = kecore_datasets.own:OWN",
    "counterfact = kecore_datasets.counterfact:COUNTERFACT",
    "easyedit = kecore_datasets.counterfact:EASYEDIT",
    "zsre = kecore_datasets.zsre:ZSRE",
    "knowedit = kecore_datasets.knowedit:KNOWEDIT",
    "knowedit-wikibio = kecore_datasets.knowedit:WIKIBIO",
    "knowedit-convsent = kecore_datasets.knowedit:CONVSENT",
    "knowedit-sanitation = kecore_datasets.knowedit:SANITATION",
    "mquake = kecore_datasets.multihop:MQUAKE",
    "akew = kecore_datasets.multihop:AKEW",
    "rippleedits = kecore_datasets.ripple:RIPPLEEDITS",
    "qaedit = kecore_datasets.questions:QAEDIT",
    "wikibigedit = kecore_datasets.questions:WIKIBIGEDIT",
    "hallueditbench = kecore_datasets.questions:HALLUEDITBENCH",
    "unke = kecore_datasets.longform:UNKE",
    "editeverything = kecore_datasets.longform:EDITEVERYTHING",
    "safeedit = kecore_datasets.longform:SAFEEDIT",
    "mzsre = kecore_datasets.multilingual:PARALLEL",
    "mlake = kecore_datasets.multilingual:MLAKE",
    "cknowedit = kecore_datasets.multilingual:CKNOWEDIT",
    "knowns = kecore_datasets.knowns:KNOWNS",
    "tofu = kecore_datasets.tofu:TOFU",
    "rwku = kecore_datasets.unlearning:RWKU",
    "muse = kecore_datasets.unlearning:MUSE",
    "knowundo = kecore_datasets.unlearning:KNOWUNDO",
    "fever = kecore_datasets.claims:FEVER",
    "memit_csk = kecore_datasets.claims:MEMIT_CSK",
    "medlasa = kecore_datasets.medicine:MEDLASA",
    "leme = kecore_datasets.counterfact:LEME",
    "leme-zsre = kecore_datasets.zsre:LEME_ZSRE",
    "elken = kecore_datasets.statements:ELKEN",
    "dune = kecore_datasets.statements:DUNE",
    "ultraeditbench = kecore_datasets.questions:ULTRAEDITBENCH",
    "codeupdatearena = kecore_datasets.codeupdates:CODEUPDATEARENA",
    "taxi = kecore_datasets.concepts:TAXI",
    "conceptedit = kecore_datasets.concepts:CONCEPTEDIT",
    "uniedit = kecore_datasets.uniedit:UNIEDIT",
]

COMMANDS = [
    "trace = kecore_analysis.commands.trace:trace",
    "cache = kecore_analysis.commands.cache:cache",
    "serve = kecore_serve.commands.serve:serve",
    "sign = kecore_serve.commands.sign:sign",
    "check = kecore_analysis.commands.check:check",
    "checkup = kecore_analysis.commands.checkup:checkup",
    "eval = kecore_bench.commands.eval:evaluate",
    "compare = kecore_bench.commands.compare:compare",
    "bench = kecore_bench.commands.bench:bench",
    "report = kecore_bench.commands.report:report",
    "metrics = kecore_bench.commands.metrics:metrics",
    "import-triples = kecore_datasets.import_triples:import_triples",
    "ledger = kecore_serve.commands.ledger:app",
    "log = kecore_serve.commands.ledger:log",
    "tag = kecore_serve.commands.ledger:tag",
    "diff = kecore_serve.commands.ledger:diff",
    "checkout = kecore_serve.commands.ledger:checkout",
    "verify = kecore_serve.commands.checks:verify",
    "replay = kecore_serve.commands.checks:replay",
    "studio = kecore_studio.commands.studio:studio",
]

JOURNALS = ["ledger = kecore_serve.ledger:open_if_ledger"]

TRACKERS = [
    "trackio = kecore_bench.trackers.trackio:Trackio",
    "wandb = kecore_bench.trackers.wandb:Wandb",
    "mlflow = kecore_bench.trackers.mlflow:Mlflow",
]

PLUGINS = (
    "kecore_methods",
    "kecore_datasets",
    "kecore_metrics",
    "kecore_bench",
    "kecore_analysis",
    "kecore_serve",
    "kecore_studio",
    "kecore_cpu",
)

ACCELERATORS = [
    "attention = kecore_cpu.attention:by_groups",
    "onednn = kecore_cpu.onednn:products",
]

packages = find_packages(include=["kecore", "kecore.*"])
packages += find_packages("plugins", include=[f"{name}*" for name in PLUGINS])
package_dir = {name: f"plugins/{name}" for name in PLUGINS}
package_data = {
    "": ["*.json", "*.css", "*.js"],
    "kecore": ["py.typed"],
    "kecore.data": ["*"],
    "kecore_studio": ["page/*"],
}

# What `kecore explain` prints.
packages.append("kecore._errors")
package_dir["kecore._errors"] = "docs/errors"
package_data["kecore._errors"] = ["*.md"]

# What `kecore new-method` makes a package of.
packages.append("kecore._tutorial")
package_dir["kecore._tutorial"] = "plugins/kecore-hello"

if Path("csrc").is_dir():
    # The sources travel in the wheel, so that an installed kecore can compile them at first use.
    packages.append("kecore._csrc")
    package_dir["kecore._csrc"] = "csrc"
    package_data["kecore._csrc"] = ["**/*.h", "**/*.cuh", "**/*.cpp", "**/*.cu"]


def native() -> dict[str, Any]:
    """Arguments of setup() that compile ``kecore/_C.abi3.so``; with CUDA where torch has it and an nvcc is found."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    spec = spec_from_file_location("_build", "kecore/_build.py")
    build = module_from_spec(spec)
    spec.loader.exec_module(build)
    kinds = ["cpu", "binding"] + ["cuda"] * (CUDA_HOME is not None)
    files = [os.path.relpath(file) for kind in kinds for file in build.sources(kind)]
    flags = {"cxx": [*build.cxx_flags(torch.__version__), *build.DEFINES]}
    if CUDA_HOME is not None:
        flags["cxx"] += build.CUDA_DEFINES
        flags["nvcc"] = [*build.NVCC_FLAGS, *build.gencode(build.ARCHITECTURES), build.PTX]
    kind = CppExtension if CUDA_HOME is None else CUDAExtension
    return {
        "ext_modules": [
            kind("kecore._C", files, extra_compile_args=flags, extra_link_args=["-pthread"], py_limited_api=True)
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    **(native() if os.environ.get("KECORE_BUILD_NATIVE") == "1" else {}),
    packages=packages,
    package_dir=package_dir,
    package_data=package_data,
    entry_points={
        "console_scripts": ["kecore = kecore.cli:main"],
        "kecore.methods": METHODS,
        "kecore.stages": STAGES,
        "kecore.metrics": METRICS,
        "kecore.datasets": DATASETS,
        "kecore.commands": COMMANDS,
        "kecore.journals": JOURNALS,
        "kecore.accelerators": ACCELERATORS,
        "kecore.trackers": TRACKERS,
    },
)
