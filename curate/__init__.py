"""What images and captions are worth: image shards into columns by key.

config.py    what a user sets
scorers.py   one function or class a kind of score: images and captions in, columns out
duplicates.py semantic duplicates over kept embeddings: the one score that looks at all images together
shardwork.py what each stage does with a shard: read its images, commit what is made of them
stage.py     the stage: one image shard in, one shard of columns out
captioning.py, captioners.py  the same for new captions
funnel.py    what rules on the columns would take, and a contact sheet of it
takedown.py  what the images have no more is blanked
"""
