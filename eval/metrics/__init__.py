"""The metrics, one file each, and what they share.

frechet          Frechet distance (FID and its like), its error, and its bias where that can be taken out
kernel           kernel distances: KID, its like on DINOv2, CMMD
neighbours       precision, recall, density, coverage
inception_score  Inception score
clip_score       CLIP score and raw cosine
retrieval        an image's caption among a hundred
memorisation     each image's nearest training image
moments          count, mean, scatter in float64: merge, un-merge
definitions      names, directions and definitions of all of them
estimate         a number and how far to trust it: jackknife, cluster and Wilson errors
statistics       the real side of the distances, worked out once
"""
