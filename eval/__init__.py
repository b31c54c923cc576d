"""A model to numbers and a page: generated shards, features, metrics with their errors, a report.

evaluation   one evaluation: a model, a protocol, the stages that make what it needs, the numbers at their end
config       what a user sets
protocol     how a number was measured, with a short id; unlike protocols are never compared
model        which model: a checkpoint, the run's export, any diffusers pipeline; digests of its parts
prompts      the captions that are prompts: of held-out images, of a text file, of a suite in JSON lines
generate     prompts to images, with noise that depends on the prompt and the replicate alone
stage        the generated shards
features     images of any shards through one network, once
networks/    Inception, DINOv2, CLIP, the VAE; how images come to their sizes
scoring/   VQAScore and Soft-TIFA, learned preferences, a module of the user's own
metrics/     the metrics, one file each, and their errors
measure      committed shards to metrics.json, whole and by tag
compare      paired differences, a verdict, alarms
grid         samplers x steps x guidance: cells, what is given up, the frontier and its knee
suites       images out for benchmarks, scores in
coco         COCO as a reference and its prompts
human        blinded pairs and Bradley-Terry scores
explain      the same images under every published FID's protocol
sample       images on request
edit, attention, triples   an image changed by changing its prompt; how words look; such pairs to train on
prior        images of a class that a fine-tuning is to keep in mind
reconstruct  what a VAE keeps of images that it never saw
trackers     the numbers for TensorBoard, wandb, MLflow
report/      one HTML page a checkpoint, an index, the history
rows, shardwork, inputs   reading columns; what every stage does with a shard; files that people name
"""
