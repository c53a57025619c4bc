"""Sizes of the multi-scale Transformer: the paper's (section 3) and, where it is silent, EuroBERT-210m's."""

from pydantic import Field, model_validator

from megascale.config import Section


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

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        encoders = (("width", self.width, self.heads), ("local_width", self.local_width, self.local_heads))
        for name, width, heads in encoders:
            if width % heads or (width // heads) % 2:
                raise ValueError(f"{name}={width} must split into {heads} heads of an even width")
        return self
