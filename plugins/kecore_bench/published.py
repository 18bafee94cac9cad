"""Figures of papers, to stand beside those of the runs that repeat them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["PaperTable", "unmeasured"]


class PaperTable(BaseModel):
    """A table of a paper, or the part of it that was measured on one model and one data set.

    Examples:
        >>> table = PaperTable(paper="Meng et al. 2023", rows={"memit": {"edit_success": 98.9}})
        >>> table.scores("memit")
        {'edit_success': 0.989}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    paper: str = Field(min_length=1, description="authors, title, venue and year")
    arxiv: str = Field(default="", description="its arXiv id")
    table: str = Field(default="", description="which table of it")
    model: str = Field(default="", description="its model, as a part of a model's reference, such as gpt-j-6b")
    data: str = Field(default="", description="its data set, as a part of a file's name; of any where left out")
    moment: str = Field(default="", description="when its facts were scored: at-edit or at-end of a sequence")
    records: int | None = Field(default=None, ge=1, description="number of its facts")
    setting: str = Field(default="", description="what else decides its figures, in words")
    remark: str = Field(default="", description="where its metrics are other ones than kecore's, in words")
    per: float = Field(default=100.0, gt=0, description="its figures are so many times kecore's, as for percentages")
    rows: Mapping[str, Mapping[str, float]] = Field(
        min_length=1, description="its figures by method, as a row of the plan is named, and by kecore's metric"
    )

    @model_validator(mode="after")
    def _filled(self) -> PaperTable:
        for name, figures in self.rows.items():
            if not figures:
                raise ValueError(f"the paper's row '{name}' has no figures; leave it out")
        return self

    @property
    def source(self) -> str:
        """Short reference of the figures, for files that have no room for more: ``arXiv 2210.07229, Table 1``."""
        source = f"arXiv {self.arxiv}" if self.arxiv else self.paper
        return f"{source}, {self.table}" if self.table else source

    def scores(self, method: str) -> dict[str, float]:
        """Return a row in kecore's own unit."""
        return {key: round(value / self.per, 12) for key, value in self.rows[method].items()}  # 0.989, not 0.98900...01


def unmeasured(tables: Sequence[PaperTable], keys: Collection[str]) -> list[str]:
    """Return the metrics of papers that are none of ``keys``, of an axis (``key.axis``) its metric; each once."""
    missing: list[str] = []
    for table in tables:
        for figures in table.rows.values():
            missing += [key.partition(".")[0] for key in figures if key.partition(".")[0] not in keys]
    return list(dict.fromkeys(missing))
