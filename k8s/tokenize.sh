#!/bin/sh
# What the RayJob `tokenize` runs on Ray's head: what is pretrained on, then the labelled corpora by the same codec.
# A script, since KubeRay puts an entrypoint unquoted into the submitter's shell. Finished folders are passed over.
set -e
python launch/tokenize_audio.py "$TOKENIZE_CONFIG" $SOURCE output.url="$TOKENS_URL/pretrain" \
    codec.weights="$CODEC_WEIGHTS" workers.count="$TOKENIZE_WORKERS"
for KIND in gtzan nsynth music_speech; do
    python launch/tokenize_audio.py "$TOKENIZE_CONFIG" source.kind=$KIND source.url="$AUDIO_URL/$KIND" \
        output.url="$TOKENS_URL/$KIND" codec.weights="$LABELLED_CODEC_WEIGHTS" workers.count="$TOKENIZE_WORKERS"
done
