"""Evaluation: features, metrics, reference statistics, and the protocol behind every number.

Reading order:

1. `metrics`: Fréchet distance, Inception Score, FDr; then `precision_recall`, `kid`, `bootstrap`.
2. `resize`, `inception`, `features`: from uint8 images to feature vectors.
3. `image_source`: folders, files and models as images by index.
4. `references`: statistics of real images, and other libraries' files.
5. `extract`: features of many images, in pieces, on all ranks.
6. `evaluate`: the whole evaluation; `results`: its protocol and numbers as JSON.
7. `clip`, `clip_score`: how well images fit captions; `sweep`: both over guidance scales.
8. `likelihood`: bits per dimension of a model.
9. `memorization`: copies of training images. `during_training`: evaluations of a run.
"""
