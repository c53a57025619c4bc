"""Sizes of the multi-scale Transformer: the paper's (section 3) and, where it is silent, EuroBERT-210m's."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megascale.config import Section

Pooling = Literal["mean", "mean_std"]  # of frames to what a linear layer sees


class ModelConfig(Section):
    """The model's shape. The number of codebooks is not here: it follows from the bitrate."""

    layers: int = Field(12, ge=1, description="global encoder: number of layers")
    width: int = Field(768, ge=8, description="global encoder: width D; a multiple of the number of codebooks")
    heads: int = Field(12, ge=1, description="global encoder: attention heads")
    mlp_width: int = Field(3072, ge=8, description="global encoder: inner width of the SwiGLU")
    local_layers: int = Field(2, ge=1, description="local encoder: number of layers")
    local_width: int = Field(256, ge=8, description="local encoder: width")
    local_heads: int = Field(4, ge=1, description="local encoder: attention heads")
    local_mlp_width: int = Field(1024, ge=8, description="local encoder: inner width of the SwiGLU")
    rope_theta: float = Field(250_000.0, gt=1, description="base of the rotary frequencies, both encoders")
    init_from: str | None = Field(
        None,
        description="hf:FOLDER_OR_ID: the global encoder's blocks and last norm begin as those of this EuroBERT-shaped "
        "language model (safetensors); null: drawn anew",
    )

    @field_validator("init_from")
    @classmethod
    def _is_a_language_model(cls, init_from: str | None) -> str | None:
        if init_from is not None and (not init_from.startswith("hf:") or init_from == "hf:"):
            raise ValueError("reads hf:FOLDER_OR_ID")
        return init_from

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        encoders = (("width", self.width, self.heads), ("local_width", self.local_width, self.local_heads))
        for name, width, heads in encoders:
            if width % heads or (width // heads) % 2:
                raise ValueError(f"{name}={width} must split into {heads} heads of an even width")
        return self

    def shape(self) -> dict[str, Any]:
        """Return what a checkpoint tells to rebuild the model: all but where its first weights came from."""
        return self.model_dump(mode="json", exclude={"init_from"})
