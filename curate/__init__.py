"""What pictures and captions are worth: image shards into columns by key.

config.py    what a user sets
scorers.py   one function or class a kind of score: pictures and captions in, columns out
stage.py     the stage: one image shard in, one shard of columns out
selection.py which samples pass declared ranges and quantiles of any column
"""
