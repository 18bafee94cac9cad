"""How the hyper-parameter files of EasyEdit and of the MEMIT family are read: one table a method, by family."""

from kecore_methods.hparams.finetune import ADALORA, DPO, FT_L, FT_M, LORA, QLORA
from kecore_methods.hparams.locate import (
    ALPHAEDIT,
    EAMET,
    EMMET,
    ENCORE,
    KN,
    MEMIT,
    MEMIT_FE,
    PMET,
    ROME,
    SIMIE,
    SPHERE,
    ULTRAEDIT,
)
from kecore_methods.hparams.others import DEFER, GRACE, IKE, KE, MALMEN, MELO, MEND, SERAC, WISE
from kecore_methods.hparams.table import HparamsTable

__all__ = [
    "ADALORA",
    "ALPHAEDIT",
    "DEFER",
    "DPO",
    "EAMET",
    "EMMET",
    "ENCORE",
    "FT_L",
    "FT_M",
    "GRACE",
    "IKE",
    "KE",
    "KN",
    "LORA",
    "MALMEN",
    "MELO",
    "MEMIT",
    "MEMIT_FE",
    "MEND",
    "PMET",
    "QLORA",
    "ROME",
    "SERAC",
    "SIMIE",
    "SPHERE",
    "ULTRAEDIT",
    "WISE",
    "HparamsTable",
]
