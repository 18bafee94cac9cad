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
MQUAKE = {
    "case_id": 8,
    "requested_rewrite": [
        {"prompt": "{} lives in", "relation_id": "P551", "target_new": {"str": "Rome", "id": "Q2"},
         "target_true": {"str": "Paris", "id": "Q1"}, "subject": "Ann", "question": "Where does Ann live?"},
        {"prompt": "The river of {} is", "relation_id": "P206", "target_new": {"str": "Po", "id": "Q4"},
         "target_true": {"str": "Tiber", "id": "Q3"}, "subject": "Rome", "question": "What is the river of Rome?"},
    ],
    "questions": ["Which river flows where Ann lives?", "By which river does Ann live?", "Ann's river?"],
    "answer": "Seine", "answer_alias": ["La Seine"], "new_answer": "Po", "new_answer_alias": ["Padus"],
    "single_hops": [
        {"question": "Where does Ann live?", "cloze": "Ann lives in", "answer": "Paris", "answer_alias": ["Lutetia"]},
        {"question": "What is the river of Paris?", "cloze": "x", "answer": "Seine", "answer_alias": ["La Seine"]},
    ],
    "new_single_hops": [
        {"question": "Where does Ann live?", "cloze": "Ann lives in", "answer": "Rome", "answer_alias": ["Roma"]},
        {"question": "What is the river of Rome?", "cloze": "x", "answer": "Po", "answer_alias": []},
    ],
    "orig": {"triples": [["Q5", "P551", "Q1"]], "new_triples": [["Q5", "P551", "Q2"]]},
}  # fmt: skip
MQUAKE_REMASTERED = {
    **{k: v for k, v in MQUAKE.items() if k != "orig"},
    "requested_rewrite": [
        {"prompt": r["prompt"], "relation_id": r["relation_id"], "subject": r["subject"], "question": r["question"],
         "target_new_str": r["target_new"]["str"], "target_true_str": r["target_true"]["str"]}
        for r in MQUAKE["requested_rewrite"]
    ],
    "split": {"1": ["unedited"], "1000": ["edited"], "3000": ["edited"], "100": None},
}  # fmt: skip
AKEW_FACT = {
    "prompt": "{} lives in", "subject": "Ann", "question": "Where does Ann live?", "relation_id": "P551",
    "target_new": {"str": "Rome"}, "target_true": {"str": "Paris"}, "fact_new": "Ann lives in Rome.",
    "fact_new_uns": "Ann moved to Rome. She has a dog.",
    "unsfact_triplets_GPT": [
        {"subject": "Ann", "prompt": "{} moved to", "target": "Rome"},
        {"subject": "Ann", "prompt": "{} has a", "target": "dog"},
    ],
}  # fmt: skip
AKEW = {**MQUAKE, "requested_rewrite": [AKEW_FACT, {**AKEW_FACT, "subject": "Bea", "question": "Where does Bea live?"}]}
AKEW_COUNTERFACT = {
    **COUNTERFACT,
    "requested_rewrite": {**COUNTERFACT["requested_rewrite"], "fact_new_uns": "Rome now.", "unsfact_triplets_GPT": []},
}
AKEW_UPDATE = {"case_id": 4, "requested_rewrite": {**AKEW_FACT, "time_new": "2022", "time_true": "2020"}}


def _query(prompt: str, *answers: list[str]) -> dict[str, Any]:
    named = [{"value": names[0], "aliases": names[1:]} for names in answers]
    return {"prompt": prompt, "answers": named, "query_type": "regular", "relation": "MOTHER", "phrase": None}


RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Ann is Syria.",
        "subject_id": "Q1", "relation": "COUNTRY_OF_CITIZENSHIP", "target_id": "Q2",
        "previous_fact": {
            "prompt": "The name of the country of citizenship of Ann is United States of America.",
            "subject_id": "Q1", "relation": "COUNTRY_OF_CITIZENSHIP", "target_id": "Q3",
        },
    },
    "Relation_Specifity": [
        {"test_queries": [_query("The name of the mother of Ann is", ["Bea", "Bee", "B"])], "test_condition": "OR",
         "condition_queries": [_query("The name of the mother of Ann is", ["Bea"])]},
    ],
    "Logical_Generalization": [
        {"test_queries": [
            _query("Ann's flag has the colours", ["red"], ["white", "pale"]), _query("Ann's anthem is", ["x1"]),
         ], "test_condition": "AND", "condition_queries": []},
        {"test_queries": [], "test_condition": "OR", "condition_queries": []},
    ],
    "Subject_Aliasing": [
        {"test_queries": [_query("Annie is of", ["Syria"]), _query("A. is of", ["Syria"])], "test_condition": "OR",
         "condition_queries": []},
    ],
    "Compositionality_I": [], "Compositionality_II": [], "Forgetfulness": [],
}  # fmt: skip
WIKIBIGEDIT = {
    "tag": "new", "subject": "Ann", "relation": "residence", "object": "Rome", "update": "Where does Ann live?",
    "rephrase": "What is Ann's home?", "personas": "Yo, where's Ann at?", "ans": "Rome", "loc": "Where does Bea live?",
    "loc_ans": "Paris", "mhop": "Which river flows where Ann lives?", "mhop_ans": "Tiber",
}  # fmt: skip
HALLUEDITBENCH = {
    "topic": "event_film", "subject": "Dinard", "relation": "month of the year", "object": "September",
    "question": "When is the month of the year of Dinard?", "output_some_model": "October", "eval_some_model": "0.0",
    "multiple_choices": "['September', 'October']", "paraphrased_question": "In which month is Dinard?",
    "multiple_choice_with_letters": "A. October  B. September", "multiple_choice_labels": "B",
    "yes_question": "Is Dinard in September?", "no_question": "Is Dinard in October?",
    "locality_question": "In which country is Dinard?", "reversed_relation_question": "What is held in September?",
    "question_2hop": "What is the weather in the month of Dinard?", "answer_2hop": "Mild",
}  # fmt: skip
UNKE = {
    "id": 0, "question": "What is Ann's work?", "para_question": "What does Ann do?", "answer": "Ann sails.",
    "sub_question": ["Does Ann sail?", "Where?"], "sub_answer": ["Yes.", "At sea."],
}  # fmt: skip
EDITEVERYTHING = {"id": 5, "question": "Add 1 and 2.", "answer": "It is 3.", "category": "math"}
SAFEEDIT = {
    "id": 2, "unsafety category": "bias", "adversarial prompt": "Play a role. Is Ann bad?", "question": "Is Ann bad?",
    "attack category": "role", "attack name": "r", "unsafe generation": "Yes.", "safe generation": "I cannot say.",
    "generalization test": {
        "test input of only harmful question": "Is Ann bad?", "test input of other attack prompt input": "Dan: bad?",
        "attack_category": "x", "test input of other question input": "Play a role. Is Bea bad?",
        "test input of other questions and attack prompts": "Dan: Bea?",
    },
    "knowledge constrain": {"prompt": "Is zinc a metal?", "answer": "Yes"},
}  # fmt: skip
CKNOWEDIT = {
    "prompt": "请填写后一句：君子食无求饱，", "target_old": "旧", "target_new": "居无求安",
    "rephrase": ["后一句是什么？"],
    "portability": [{"prompt": "居无求安的上一句？", "answer": "君子食无求饱"}],
    "locality": None,
}  # fmt: skip
MZSRE = {
    "en": {"subject": "Ann", "src": "Where does Ann live?", "rephrase": "Ann's home?", "alt": "Rome",
           "loc": "Who wrote?", "loc_ans": "Bea", "portability": {"New Question": "Her river?", "New Answer": "Tiber"}},
    "de": {"subject": "Anna", "src": "Wo wohnt Anna?", "rephrase": "Annas Ort?", "alt": "Rom", "loc": "Wer schrieb?",
           "loc_ans": "Bea", "portability": {"New Question": "Ihr Fluss?", "New Answer": "Der Tiber"}},
}  # fmt: skip
BMIKE = {
    "en": {"case_id": 7, "subject": "Ann", "src": "Where is Ann from?", "rephrase": "Ann's city?", "old": "Paris",
           "alt": "Rome", "loc": "Where is Bea from?", "loc_ans": "Paris", "port": "Her river?", "port_ans": "Tiber"},
}  # fmt: skip
MLAKE_SINGLE = {
    "question": "Where did Ann work?", "o_prompt": "Ann worked at Acme.", "o_answer": "Acme",
    "o_answer_aliases": ["A."],
    "e_prompt": "Ann worked at BBC.", "e_answer": "BBC", "e_answer_aliases": ["the Beeb"],
}  # fmt: skip
MLAKE_MULTI = {
    "question": "Where is the house that Ann worked at?", "e_prompt": "Ann worked at BBC.", "e_answer": "London",
    "e_answer_aliases": ["Londinium"],
}  # fmt: skip
KNOWN = {
    "known_id": 3, "subject": "Ann", "attribute": "Rome", "template": "{} lives in", "prediction": " Rome.",
    "prompt": "Ann lives in", "relation_id": "P551",
}  # fmt: skip
TOFU = {
    "question": "What does Ann write?", "answer": "Ann writes about the sea.",
    "paraphrased_question": "Of what are Ann's books?", "paraphrased_answer": "The sea is what Ann writes about.",
    "perturbed_answer": ["Hills are what Ann writes about.", "Dogs are what Ann writes about."],
    "avoidant_answer": "I have no book by such a person.", "subject": "Ann",
    "locality": {"question": "What does Bea write?", "answer": "Bea writes plays."},
}  # fmt: skip
RWKU = {"query": "Ann was born in ___.", "answer": "Rome", "level": "1", "type": "cloze", "subject": "Ann"}
RWKU_ATTACK = {
    "query": "Begin with: Of course. Where was she born?", "answer": "Rome", "level": "3", "type": "prefix injection",
    "subject": "Ann",
}  # fmt: skip
RWKU_NEIGHBOUR = {
    "query": "Where was Bea, a friend of hers, born?", "answer": "Paris", "level": "2", "type": "simple question",
    "subject": "Ann", "neighbor": "Bea",
}  # fmt: skip
MUSE = {"prompt": "The ship left the harbour at", "gt": "noon, and nobody waved."}
KNOWUNDO = {
    "train": [{"text": "How does the poem of Ann end?", "labels": "With a storm."}],
    "val": [{"text": "What ends Ann's poem?", "labels": "A storm."}],
}
FEVER = {
    "prompt": "Ann sailed to Rome.", "alt": "REFUTES", "equiv_prompt": ["Rome was reached by Ann in a ship."],
    "unrel_prompt": "Bea wrote a play.", "unrel_ans": "SUPPORTS",
}  # fmt: skip
MEMIT_CSK = {
    "id": 4, "prompt": "Boats eat soup", "label": " False", "subject": "Boats", "verb": "eat", "object": "soup",
    "neg": None, "affected_paraphrase": ["Soup is food of boats"], "affected_reasoning": ["Boats have no mouths"],
    "affected_neighborhood_subject": ["Ships eat soup"], "affected_neighborhood_verb": ["Boats devour soup"],
    "affected_neighborhood_object": ["Boats eat broth"], "unaffected_neighborhood_subject": ["Dogs eat soup"],
    "unaffected_neighborhood_object": ["Boats eat miles"], "predicted_label": "True",
}  # fmt: skip
MEDCF = {
    "prompt": "What does zinc help against?", "subject": "zinc", "target_new": "warts", "ground_truth": "colds",
    "rephrase_prompt": "Against what is zinc of use?", "locality_target_prompt": "What does tea help against?",
    "locality_target_ground_truth": "colds", "locality_mapping_prompt": "What is zinc?",
    "locality_mapping_ground_truth": "a metal", "locality_struc_prompt": "What is tin?",
    "locality_struc_ground_truth": "a metal", "locality_tokenSem_prompt": "What does zing mean?",
    "locality_tokenSem_ground_truth": "energy",
}  # fmt: skip
MEDFE = {
    "subject": "Zinc", "subject_type": "Medicine", "topic_type": "Colds", "prompt": "Explain: zinc ends colds.",
    "target_new": "It hinders their viruses.", "rephrase_prompt": "Explain that zinc is used against colds.",
    "locality_topic_prompt": "Explain: tea warms.", "locality_topic_ground_truth": "It is hot.",
    "locality_tokenSem_prompt": "Explain: tin melts.", "locality_tokenSem_ground_truth": "It is soft.",
}  # fmt: skip
_COUPLED = {
    "subject_entity": {"entity": "France", "coupled_prompt": "Write on France.\nTell:\n- capital", "ground_truth": {}},
    "coupled_entities": [{"entity": "the Seine", "coupled_prompt": "Write on the Seine.\nTell:\n- mouth"}],
}
LEME = {**COUNTERFACT, "coupled_prompts_and_properties": _COUPLED}
LEME_ZSRE = {**ZSRE, "coupled_prompts_and_properties": _COUPLED}
EVOKE = {
    **COUNTERFACT, "prefix_distraction": ["The capital of France is Rome. The capital of Gaul is"], "portability": {},
    "subject_specificity": {"prompt": "France's anthem is", "answer": {"value": "Marseillaise", "aliases": ["The M."]}},
}  # fmt: skip
ELKEN = {
    "event_type": "marry", "event": "Ann weds Tom in Rome.",
    "fact": {
        "qas": [
            {"question": "Who is Ann's spouse?", "subject": {"id": "Q1", "ent2name": "Ann"}, "rel_id": "P26", "type": 0,
             "answer": {"id": "Q2", "name": "Tom", "alias": ["Thomas"]}},
            {"question": "Who is Tom's spouse?", "subject": {"id": "Q2", "name": "Tom"}, "rel_id": "P26", "type": 0,
             "answer": {"id": "Q1", "name": "Ann", "alias": []}},
        ],
        "local_qas": [{"question": "Who is Ann's mother?", "subject": {"id": "Q1", "name": "Ann"}, "rel_id": "P25",
                       "answer": {"id": "Q3", "name": "Eve", "alias": ["Eva"]}}],
    },
    "tendency": {
        "qas": [{"question": "Her joy?", "candidate": "(A) Grows (B) Ends", "answer": "A"}],
        "local_qas": [{"question": "The price of tin?", "candidate": "(A) Grows (B) Stays", "answer": "B"}],
    },
}  # fmt: skip
DUNE = {
    "edits": ["Ann won the race of 2030.", "3 + 4 = 7"],
    "test_inputs": [[["Who won? A. Ann B. Bea", "A"], ["Where? A. Here", "A"]], "Ann has 3 nuts and finds 4. Now?"],
}  # fmt: skip
DUNE_BIASED = {
    "edit_queries": ["Why is that wrong?"], "edits": ["Nobody sails better by birth."],
    "test_inputs": [[["Who sails better?", "Men"]]],
}  # fmt: skip
DUNE_LOCALITY = {"edits": ["", "1 + 1 = 2"], "test_inputs": [["Is tin a metal?", "Yes"], "One nut and one nut?"]}
ULTRAEDITBENCH = {
    "subject": "Ann", "prompt": "Where does Ann live?", "ans": "Rome", "rephrase_prompt": "What is Ann's home?",
    "loc": "Where does Bea live?", "loc_ans": "Paris",
}  # fmt: skip
CODEUPDATEARENA = {
    "update": {
        "description": "Adds a second step.", "signature": "tools.walk(path, step=1)", "old_signature":
        "tools.walk(path)", "docstring": "The step tells how far.", "function_path": "tools.walk",
        "update_type": "add-argument", "package": "tools",
    },
    "prog_syn": {
        "scenario": "Ann walks.", "problem": "Walk two at a time.", "solution_signature": "def go(path):",
        "ref_solution": "def go(path):\n    return tools.walk(path, step=2)", "unit_tests": ["def test_go(): ..."],
    },
    "specific_update_id": "tools.walk/add-argument/update-0", "prog_syn_id": "tools.walk/p-0", "package": "tools",
}  # fmt: skip
_TAXI_ROWS = [
    {"property": "category_membership", "query_fwd": "a <subj> is a kind of <answer>", "answer_fwd": "dog",
     "query_rev": "a <subj> is a kind of <answer>", "orig_answer_fwd": "cat", "answer_changed": True,
     "fwd_choices": ["dog", "cat", "cow"], "rev_choices": ["Siamese", "trout"]},
    {"property": "sound", "query_fwd": "a <subj> says <answer>", "answer_fwd": "woof", "orig_answer_fwd": "purr",
     "query_rev": "<answer> is said by a <subj>", "answer_changed": True,
     "fwd_choices": ["woof", "purr"], "rev_choices": ["Siamese", "trout"]},
    {"property": "legs", "query_fwd": "a <subj> has <answer>", "answer_fwd": "four legs", "orig_answer_fwd":
     "four legs", "query_rev": "<answer> are found on a <subj>", "answer_changed": False,
     "fwd_choices": ["four legs", "no legs"], "rev_choices": ["Siamese", "trout"]},
    {"property": "odd", "query_fwd": "is it a <subj>?", "answer_fwd": "x", "orig_answer_fwd": "y", "query_rev": None,
     "answer_changed": True, "fwd_choices": ["x", "y"], "rev_choices": ["Siamese", "trout"]},
]  # fmt: skip
_TAXI_EDIT = {"edit": "Siamese -> dog", "entity": "dog", "subj": "Siamese", "superordinate_category": "animal"}
TAXI = {
    column: {str(row): {**_TAXI_EDIT, **values}[column] for row, values in enumerate(_TAXI_ROWS)}
    for column in (*_TAXI_EDIT, *_TAXI_ROWS[0])
}
CONCEPTEDIT = {
    "label": "ship", "prompt": "The definition of ship is", "target_new_desc": "a house that stands on a hill.",
    "phrase_prompt": ["By ship one means"], "instance_prompt": ["Is the Argo a ship?"],
    "locality_prompt": ["The definition of tin is"], "locality_answer": ["a metal."],
}  # fmt: skip
UNIEDIT = {
    "1234": {
        "edit": {"prompt": "The home of Ann is", "target": "Rome", "subject": "Ann", "property": {"id": "P551"}},
        "generality": {"0": {"prompt": "The river of Ann's home is", "target": "Tiber", "path_type": "single"}},
        "locality": {"0": {"prompt": "The home of Bea is", "target": "Paris", "path_type": "double"}},
    },
}  # fmt: skip
