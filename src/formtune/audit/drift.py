"""Whether the training inputs are like production's: can a classifier tell them apart, and by which words?"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

SAMPLE = 4000  # inputs of each side for the classifier
FEATURES = 12  # words named for each side


def compare_inputs(train: Sequence[str], production: Sequence[str]) -> dict[str, Any]:
    """A classifier two-sample test (Lopez-Paz and Oquab, 2017) and the words that production uses and train does not.

    `auc` is that of a logistic regression over words and word pairs, cross-validated: 0.5 where nothing tells the two
    apart, 1.0 where everything does; `auc_length` that of the length in characters alone. `features` are the words most
    typical of either side, `known_words` and `known_pairs` the shares of production's that occur in train.
    """
    # Slow to import, and needed only where production's inputs are given.
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict

    rng = random.Random(0)
    ours = rng.sample(list(train), min(SAMPLE, len(train)))
    theirs = rng.sample(list(production), min(SAMPLE, len(production)))
    texts, sides = ours + theirs, [0] * len(ours) + [1] * len(theirs)
    word = r"(?u)\b\w+\b"
    length_auc = roc_auc_score(sides, [len(text) for text in texts]) if ours and theirs else 0.5
    result: dict[str, Any] = {
        "auc": 0.5,
        "auc_length": float(max(length_auc, 1 - length_auc)),  # which side is longer does not matter
        "features": {"train": [], "production": []},
        "known_words": 1.0,
        "known_pairs": 1.0,
        "new_words": {},
    }
    folds = min(5, len(ours), len(theirs))
    if folds > 1 and any(map(str.split, texts)):
        # The weights of words do not depend on the sides, so they need no separate folds.
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=50_000, token_pattern=word)
        vectors = vectorizer.fit_transform(texts)
        model = LogisticRegression(class_weight="balanced", max_iter=1000)
        scores = cross_val_predict(model, vectors, sides, cv=folds, method="predict_proba")[:, 1]
        result["auc"] = max(0.5, float(roc_auc_score(sides, scores)))  # below, chance decided
        names, weights = vectorizer.get_feature_names_out(), model.fit(vectors, sides).coef_[0]
        order = weights.argsort()
        result["features"] = {
            "train": [(str(names[i]), float(weights[i])) for i in order[:FEATURES]],
            "production": [(str(names[i]), float(weights[i])) for i in order[::-1][:FEATURES]],
        }
    for key, size in (("known_words", 1), ("known_pairs", 2)):
        analyse = CountVectorizer(ngram_range=(size, size), token_pattern=word).build_analyzer()
        seen = {gram for text in train for gram in analyse(text)}
        grams = Counter(gram for text in production for gram in analyse(text))
        new = Counter({gram: count for gram, count in grams.items() if gram not in seen})
        result[key] = 1 - new.total() / max(grams.total(), 1)
        if size == 1:
            result["new_words"] = dict(new.most_common(FEATURES))
    return result
