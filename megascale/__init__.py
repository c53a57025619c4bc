"""Audio to tokens (Ray, EnCodec), tokens to a pretrained encoder (DeepSpeed), the encoder to classifiers."""

__version__ = "0.1.0"
