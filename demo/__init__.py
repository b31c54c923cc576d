"""The demo's own corpus: drawn pictures with true captions, a server for them, and a detector that reads them back."""
