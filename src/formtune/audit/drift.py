"""Whether the training inputs are like production's: can a classifier tell them apart, and by which words?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

SAMPLE = 4000  # inputs of each side
FEATURES = 12  # words named for each side


def compare_inputs(train: Sequence[str], production: Sequence[str]) -> dict[str, Any]:
    """A classifier two-sample test (Lopez-Paz and Oquab, 2017).

    `auc` is that of a logistic regression over words and word pairs, cross-validated: 0.5 if nothing tells the two
    apart, 1.0 if everything does. `features` are the words and pairs most typical of each side.
    """
    # Slow to import, and needed only if production's inputs are given.
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict

    rng = random.Random(0)
    ours, theirs = (rng.sample(list(texts), min(SAMPLE, len(texts))) for texts in (train, production))
    texts, sides = ours + theirs, [0] * len(ours) + [1] * len(theirs)
    folds = min(5, len(ours), len(theirs))
    if folds < 2 or not any(map(str.split, texts)):
        return {"auc": 0.5, "features": {"train": [], "production": []}}
    # The weights of words do not depend on the sides, so they need no separate folds.
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, max_features=50_000, token_pattern=r"(?u)\b\w+\b"
    )
    vectors = vectorizer.fit_transform(texts)
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    scores = cross_val_predict(model, vectors, sides, cv=folds, method="predict_proba")[:, 1]
    order = model.fit(vectors, sides).coef_[0].argsort()
    typical = {"train": order[:FEATURES], "production": order[::-1][:FEATURES]}
    names = vectorizer.get_feature_names_out()
    return {
        "auc": max(0.5, float(roc_auc_score(sides, scores))),  # below 0.5 is chance
        "features": {side: [str(names[i]) for i in best] for side, best in typical.items()},
    }
