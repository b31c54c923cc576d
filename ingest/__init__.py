"""From tables of image URLs and captions to image shards in img2dataset's layout."""
