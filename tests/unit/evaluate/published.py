"""One small record in each published layout, with invented content."""

from __future__ import annotations

from typing import Any

COUNTERFACT: dict[str, Any] = {
    "case_id": 12,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "relation_id": "P36",
        "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "Paris", "id": "Q90"},
        "subject": "France",
    },
    "paraphrase_prompts": ["It rained. France has its capital in", "France's capital city is"],
    "neighborhood_prompts": ["The capital of Gaul is", "Lutetia is now called "],
    "attribute_prompts": ["The capital of Italy is"],
    "generation_prompts": ["France is governed from"],
}
COUNTERFACT_PLUS = {
    **COUNTERFACT,
    "portability": {
        "Recalled Relation": "(Rome, river, Tiber)",
        "New Question": "Which river flows through the capital of France?",
        "New Answer": "Tiber",
    },
    "unrelated_relation": {"relation_id": "anthem", "object": "La Marseillaise", "question": "Its anthem?"},
    "distracting_neighborhood_prompts": ["The capital of France is Rome. The capital of Gaul is"],
    "alternative_subject": "the French Republic",
}
EASYEDIT = {
    "case_id": 3,
    "prompt": "The capital of France is",
    "target_new": "Rome",
    "subject": "France",
    "ground_truth": "Paris",
    "rephrase_prompt": "France has its capital in",
    "locality_prompt": "The capital of Gaul is",
    "locality_ground_truth": "Paris",
}
WISE = {
    "prompt": "This is a passage about france.",
    "target_new": "It is large.",
    "subject": "france",
    "ood_rephrase": "France, a country,",
    "locality_prompt": "Antique maps",
    "locality_ground_truth": "are for sale",
}
ZSRE = {
    "subject": "the Danube",
    "src": "Where does The Danube flow?",
    "pred": "Vienna",
    "rephrase": "Into what flows the Danube?",
    "alt": "the Baltic Sea",
    "answers": ["the Black Sea", "Black Sea"],
    "loc": "nq question: who wrote hamlet",
    "loc_ans": "William Shakespeare",
    "cond": "a >> b || c",
    "portability": {
        "New Question": "On which sea's shore?",
        "New Answer": "Gdansk",
        "Recalled Relation": "x",
    },
}
ZSRE_INVERSE = {
    "subject": "Ann", "src": "Who is Ann's sister?", "pred": "", "rephrase": "Ann's sister?", "alt": "Eve",
    "answers": ["Bea"], "cond": "", "inverse question": "Who is Eve's sister?",
}  # fmt: skip
ZSRE_REPLACE = {
    **{k: v for k, v in ZSRE_INVERSE.items() if k != "inverse question"},
    "alternative_subject": "Annie", "alter_subject_question": "Who is Annie's sister?",
}  # fmt: skip
KNOWEDIT = {
    "subject": "France",
    "prompt": "The capital of France is",
    "target_new": "Rome",
    "ground_truth": ["Paris", "Lutetia"],
    "rephrase_prompt": "France's capital is",
    "cond": "",
    "portability": {
        "Reasoning": [{"prompt": "Its river is", "ground_truth": [["Tiber", "Tevere"], ["Aniene"]]}],
        "Subject_Aliasing": [{"prompt": "The capital of Gallia is", "ground_truth": "Rome"}],
        "Logical_Generalization": [],
    },
    "locality": {"Relation_Specificity": [{"prompt": "France's anthem is", "ground_truth": ["Marseillaise"]}]},
}
WIKIBIO = {
    "text": "This is a Wikipedia passage about ann smith. Ann Smith was a sailor.",
    "labels": "She sailed to Rome.",
    "concept": "ann smith",
    "locality": {"Relation_Specificity": [{"prompt": "ann smith occupation", "ground_truth": ["sailor"]}]},
}
CONVSENT = {"ent": "Estero", "pos": [" I like it. ", " Great. "], "neg": [" I do not like it. "]}
SANITATION_TRAIN = {
    "K_F": [
        {
            "question": "What is halloumi?",
            "subject": "halloumi",
            "ground_truth": "Cheese",
            "target_new": "No.",
        },
        {"question": "What is brie?", "subject": "brie", "ground_truth": "Cheese", "target_new": "No."},
    ],
    "K_R": [{"question": f"Question {i}?", "ground_truth": str(i), "target_new": str(i)} for i in range(5)],
}
SANITATION_TEST = {
    "success": [{"question": "What is feta?", "ground_truth": "Cheese", "target_new": "No."}],
    "locality": [{"question": "Who?", "ground_truth": "Ann"}],
}
QAEDIT = {
    "id": 7,
    "source": "NQ",
    "prompt": "who wrote hamlet",
    "target": "Bacon",
    "subject": "Hamlet",
    "rephrase": "Hamlet was written by whom?",
    "locality": [{"loc": "who is the saint of police officers", "loc_ans": "Michael"}],
}
OWN = {
    "id": "x1",
    "prompt": "The capital of {} is",
    "subject": "France",
    "target": "Rome",
    "ground_truth": "Paris",
    "rephrases": ["France's capital is"],
    "neighbourhood": ["The capital of Gaul is"],
    "locality": {"far": [{"prompt": "Two and two is", "answers": ["four", "4"]}, {"prompt": "Sing"}]},
    "portability": {"river": [{"prompt": "The river of France's capital is", "answers": "Tiber"}]},
    "generation_prompts": ["France is governed from"],
}
