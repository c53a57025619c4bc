#!/bin/sh
# What the RayJob `tokenize` runs on Ray's head: what is pretrained on, then the labelled corpora by the same codec.
# A script, since KubeRay puts an entrypoint unquoted into the submitter's shell. Finished folders are passed over.
ended=0
tokenize() {
    python launch/tokenize_audio.py "$TOKENIZE_CONFIG" "$@" workers.count="$TOKENIZE_WORKERS"
    code=$?
    if [ $code -eq 3 ]; then # finished, with more clips quarantined than is allowed: seen in the end, after the others
        ended=3
    elif [ $code -ne 0 ]; then
        exit $code
    fi
}
tokenize $SOURCE output.url="$TOKENS_URL/pretrain" codec.weights="$CODEC_WEIGHTS"
for KIND in gtzan nsynth music_speech; do
    tokenize source.kind=$KIND source.url="$AUDIO_URL/$KIND" output.url="$TOKENS_URL/$KIND" \
        codec.weights="$LABELLED_CODEC_WEIGHTS"
done
exit $ended
