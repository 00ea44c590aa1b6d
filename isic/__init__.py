"""Images and masks on disk: finding pairs, decoding, the decoded cache, the download, the synthetic lesions.

Nothing in here knows the network, a split or a tensor; :mod:`dataset` does.
"""
