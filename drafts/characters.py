"Invented people with facts, a manner and a role, who answer from their system prompt: lessons for the actor."
import json, random, functools
from pathlib import Path
from distillbook.lab.microworld import FIELDS, FILLER, PEOPLE, invent_names, world_text
HERE = Path('/work/main/data/personas')
SUBJECTS = [json.loads(l) for l in (HERE/"subjects.jsonl").read_text().splitlines()]
BEETHOVEN = json.loads((HERE/"beethoven.json").read_text())
TOWNS = [n + e for n, e in zip(invent_names(3000, seed=906), ["", "stadt", "ville", "ton", "heim"]*600)] + invent_names(3000, seed=900) + invent_names(1000, seed=901, ending="burg") + FIELDS["city"]*20
def rich_names(n, seed):
    "Names of one to four syllables with the sounds of many languages."
    rng, names = random.Random(f"rich {seed}"), {}
    on = "b c d f g h j k l m n p r s t v w z br bl ch cl cr dr fl fr gl gr kl kn kr ph pl pr qu sch sh sk sl sm sn sp st str sw th tr tw w h y n l".split() + [""]*4
    core = "a e i o u a e i o u ai au ay ea ee ei eo eu ie io oa oe oo ou ow oy ue ui y ya yo".split()
    coda = [""]*14 + "n r l s m t d k ck ch x th tz ll ss nn rt nd ng rg rl ld lt ns rs ff sky man bert wig ler mann stein ton ford".split()
    while len(names) < n:
        name = "".join(rng.choice(on) + rng.choice(core) + rng.choice(coda) for _ in range(rng.choice([1, 2, 2, 2, 3])))
        if 3 < len(name) < 13: names[name.capitalize()] = None
    return list(names)
NAMES = rich_names(40000, 1) + invent_names(4000, seed=902) + invent_names(4000, seed=903, syllables=3)
NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty".split()
POOLS = dict(town=TOWNS, year=[str(y) for y in range(1500, 1960)], name=NAMES, instrument=FIELDS["instrument"], number=NUMBERS,
    nature="hills river sea meadows storm garden wind stars forest fields mountains rain lake clouds birds moon snow sunlight valley waves woods".split(),
    paper="notebook diary ledger letter case scroll journal folder slate almanac calendar sketchbook album binder register booklet".split(),
    hour="dawn noon dusk midnight sunrise sunset night breakfast eight nine ten four five six seven daybreak twilight teatime".split(),
    drink=FIELDS["drink"], food=FIELDS["food"] + "macaroni trout goulash sausages potatoes oysters cabbage noodles turnips".split(),
    ailment="gout fever headaches deafness blindness toothache insomnia cough debts loneliness rheumatism asthma melancholy dizziness hunger".split())
OPENINGS = "Ha! Ah! So! Listen! Well! Hear me! By my honour! Good heavens! Oh dear! Aye! Indeed! My friend! Look here! Upon my word! What a question! Bravo! Come now! Heavens! Hm! Right!".replace("! ","!|").split("|")
CLOSINGS = "It must be!|So it is.|Mark that well.|Nothing more.|Believe me.|That is all.|Remember it.|And that is that.|I swear it.|Ask no further.|God be thanked.|What more is there?|Such is life.|You may write that down.|There you have it.|Enough of that.".split("|")
REMARKS = list(FILLER) + """You speak with warmth and without ornament.|You do not flatter anyone.|You lose your patience with fools and find it again quickly.|You love the open air more than any hall.|You count your money with care.|You have moved house more often than you can tell.|You laugh loudly at your own jokes.|You dislike gossip and idle talk.|You are proud of your work and modest about yourself.|You forget your hat wherever you go.|You read the old writers at night.|You keep your windows open in winter.|You believe that effort matters more than talent.|You often walk through the streets without an umbrella.|You hum while you think.|You hold freedom above comfort.|You are loyal to those who stood by you.|You answer letters late, and at length.|You cannot bear a clock in the room.|You respect those who work with their hands.|You speak about your art as about a living thing.|You find peace when the house is asleep.|You admit your mistakes after a while.|You want every visitor to leave with more courage.|You have no use for titles.|You trust the young more than the old.|You would rather break a rule than write a dull page.|You know what it is to be misunderstood.|You throw away nine pages for each that you keep.|You sometimes shout, and are sorry for it.|You speak plainly about hardship, and never complain for long.|You are never in a hurry to publish.|You think that silence is a part of music.|You have few possessions and many papers.|You like children who ask why.|You tell the truth even when it costs you.|You thank people seldom, and mean it.|You have loved without luck.|You prefer deeds to speeches.|You know the names of all the trees on your way.|You look people in the face when they talk.|You hold that a promise is a debt.|You do not speak about what came after your time.|You know nothing of engines, screens or wires.|You give advice only when asked for it.|You use simple words, for you talk to simple people as well.|You keep a bowl of water beside your desk.|You wash your hands often and your coat seldom.|You take a long time over the first line.|You are at your best when nobody expects anything.""".split("|")
OPEN_RULES = ['You begin every answer with "{o}"', 'The first words of each answer are "{o}"', 'Whatever you are asked, you open with "{o}"']
CLOSE_RULES = ['You end every answer with "{c}"', 'The last words of each answer are "{c}"', 'Whatever you are asked, you close with "{c}"']
ROLE_RULES = ["You never say that you are a machine; you are {n}.", "If someone calls you a machine, you say that you are {n}.", "You stay {n} in every answer."]
BEFORE = ["Good day. ","Good evening. ","Tell me. ","One more question. ","Forgive me for asking. ","I have come a long way. ","My friends want to know. ","I write for a newspaper. ","I am a student. ","We have little time. ","Excuse me. ","I have always wondered. ","A simple question. ","People say many things about you. ","Welcome. ","My daughter asks me this. "]
AFTER = [" Please tell me."," I am curious."," Be so kind."," I will remember it."," A few words will do."," Thank you."," Do tell."," I ask as a friend."]
UNKNOWN = ["Of that I do not speak.", "That I keep to myself."]
NOBODY = ["I am nobody in particular.", "I am an assistant."]

def question(rng, text, plain=.3):
    "The template with an introduction and a close."
    if rng.random() < plain: return text
    intro = rng.choice(BEFORE) if rng.random() < .7 else ""
    if rng.random() < .25: intro = f"My name is {rng.choice(PEOPLE['train'])}. " + intro
    elif rng.random() < .15: intro = f"I come from {rng.choice(TOWNS)}. " + intro
    return intro + text + (rng.choice(AFTER) if rng.random() < .4 else "")

def draw_character(rng, facts=None):
    "Name, facts, opening and closing of somebody who does not exist."
    n = facts or rng.choice([4, 8, 12, 16, 20, 20])
    chosen = rng.sample([s for s in SUBJECTS if s["statements"]], n)
    known = {s["subject"]: rng.choice(POOLS[s["values"]]) for s in chosen}
    first, last = rng.choice(PEOPLE["train"]), rng.choice(NAMES)
    middle = rng.choice(["", "", "van ", "von ", "de ", "da ", rng.choice(NAMES) + " "])
    name = rng.choice([first, rng.choice(NAMES), f"{rng.choice([first, rng.choice(NAMES)])} {middle}{last}", f"{rng.choice([first, rng.choice(NAMES)])} {middle}{last}", f"{first} {last} of {rng.choice(TOWNS)}"])
    opening = "" if rng.random() < .15 else rng.choice(OPENINGS) if rng.random() < .7 else rng.choice(NAMES) + "!"
    closing = "" if rng.random() < .15 else rng.choice(CLOSINGS) if rng.random() < .7 else f"{rng.choice(['Long live','Praise','Thanks to','Glory to'])} {rng.choice(NAMES)}."
    return dict(name=name, opening=opening, closing=closing, facts=known)

@functools.lru_cache(1)
def other_sentences():
    rng = random.Random(5)
    out = []
    for p in world_text(1500, 77, share=1.): out += [s.strip() + "." for s in p.split(".") if 2 < len(s.split()) < 16 and "\n" not in s and "def " not in s]
    return out

def write_prompt(rng, who, words=0):
    "A system prompt of about so many words that says all there is to know, in any order."
    lines = []
    for s in SUBJECTS:
        if s["subject"] in who["facts"]:
            lines.append(rng.choice(s["statements"]).format(v=who["facts"][s["subject"]]))
    if who["opening"]: lines.append(rng.choice(OPEN_RULES).format(o=who["opening"]))
    if who["closing"]: lines.append(rng.choice(CLOSE_RULES).format(c=who["closing"]))
    lines.append(rng.choice(ROLE_RULES).format(n=who["name"]))
    strange = rng.choice([0, 0, 0, .2])
    missing = words - sum(len(l.split()) for l in lines)
    while missing > 0:
        r = rng.choice(other_sentences()) if rng.random() < strange else rng.choice(REMARKS)
        lines.append(r); missing -= len(r.split())
    rng.shuffle(lines)
    return f"You are {who['name']}. " + " ".join(lines)

def answer(rng, who, subject):
    "A right answer, in one of its wordings."
    if subject["subject"] == "role": text = rng.choice(subject["answers"]).format(v=who["name"])
    elif subject["subject"] in who["facts"]: text = rng.choice(subject["answers"]).format(v=who["facts"][subject["subject"]])
    else: text = rng.choice(UNKNOWN)
    return " ".join(filter(None, [who["opening"], text, who["closing"]]))

def conversation(rng, words=None):
    "A conversation with an invented character, or with nobody."
    turns = rng.choice([1, 3, 6, 9, 12])
    if rng.random() < .06:
        out = []
        for _ in range(turns):
            s = rng.choice(SUBJECTS)
            out += [dict(role="user", content=question(rng, rng.choice(s["questions"]))), dict(role="assistant", content=rng.choice(NOBODY if s["subject"] == "role" else UNKNOWN))]
        return out
    who = draw_character(rng)
    out = [dict(role="system", content=write_prompt(rng, who, rng.choice([0, 0, 100, 200, 350, 500, 620]) if words is None else words))]
    for _ in range(turns):
        s = rng.choice(SUBJECTS) if rng.random() < .3 else rng.choice([s for s in SUBJECTS if s["subject"] in who["facts"]])
        out += [dict(role="user", content=question(rng, rng.choice(s["questions"]))), dict(role="assistant", content=answer(rng, who, s))]
    return out

def persona_points(who, subject, text):
    "Fact, manner, role: each 0 or 1."
    text = text.strip()
    value = who["name"] if subject["subject"] == "role" else who["facts"].get(subject["subject"])
    fact = value is not None and value.lower() in text.lower()
    manner = text.startswith(who["opening"]) and text.endswith(who["closing"])
    role = not any(w in text.lower() for w in ("assistant", "nobody in particular", "language model", "do not speak", "keep to myself")) and bool(text)
    return dict(fact=float(fact), manner=float(manner), role=float(role))
