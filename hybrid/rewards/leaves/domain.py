"""Whether a text belongs to a field: medicine, the law, science."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hybrid.core import InputError
from hybrid.rewards.base import register_reward
from hybrid.rewards.classify import Classifier, label_index, load_classifier, nli_probabilities, nli_rows, probability
from hybrid.rewards.leaves.coverage import STOPWORDS
from hybrid.rewards.models import ModelReward, shared
from hybrid.rewards.samples import Samples
from hybrid.rewards.words import words

__all__ = ["Domain"]

# Words of the field that are rare outside it, in the singular; ours.
LEXICONS: dict[str, str] = {
    "medical": """
        abdomen acute allergy anaemia anemia anesthesia antibiotic antibody artery arthritis asthma bacterium bacteria
        biopsy bleeding blood bone cancer cardiac cardiovascular catheter chemotherapy cholesterol chronic clinic
        clinical clinician complication contraindication cough dehydration dementia dental diabetes diabetic diagnose
        diagnosed diagnosis diagnostic dialysis disease disorder doctor dosage dose drug emergency epidemic fever
        fracture gland glucose heart hepatitis hormone hospital hypertension immune immunity infection infectious
        inflammation inflammatory influenza injection injury insulin intravenous kidney lesion liver lung malignant
        medical medication medicine metabolic migraine muscle nausea neurological nurse obesity oncology organ pain
        paramedic pathogen patient pediatric pharmacist pharmacy physician placebo pneumonia pregnancy prescribe
        prescribed prescription prognosis psychiatric pulmonary rehabilitation renal respiratory screening sepsis
        seizure skin spine stroke surgeon surgery surgical symptom symptomatic syndrome therapeutic therapy thyroid
        tissue tumor tumour ulcer ultrasound vaccinate vaccination vaccine vein virus viral ward wound
        """,
    "legal": """
        accused acquittal adjudicate affidavit allegation alleged amendment appeal appellant appellate arbitration
        arrest attorney bail bankruptcy barrister breach burden case claimant clause clemency compensation complainant
        compliance constitution constitutional contract contractual conviction copyright counsel court courtroom
        covenant crime criminal custody damages decree deed defamation defendant deposition dispute docket due
        enforceable enforcement equity estate evidence execution felony fiduciary fraud guilty hearing hereby herein
        hereinafter immunity indemnify indemnity indictment infringement injunction judge judgment judicial judiciary
        jurisdiction jurisprudence juror jury justice law lawful lawsuit lawyer lease legal legislation legislative
        legislature lessee lessor liability liable lien litigant litigation magistrate malpractice mediation
        misdemeanor motion negligence negligent notary oath objection offence offense ordinance parole patent
        perjury petition plaintiff plea precedent probate probation prosecution prosecutor provision pursuant
        regulation remedy respondent restitution ruling sentence settlement solicitor statute statutory subpoena sue
        summons tenant testify testimony thereof tort trademark treaty trial tribunal unlawful verdict waiver warrant
        warranty whereas witness
        """,
    "scientific": """
        abstract acid algorithm amplitude analysis analytical analyze assay asymptotic atom atomic axiom bacteria
        calibration catalyst cell cellular chemical chemistry chromosome coefficient compound computation computational
        conjecture correlation cosmology covariance data dataset density derivative differential diffusion dna
        electromagnetic electron empirical energy entropy enzyme equation equilibrium estimate evolution experiment
        experimental exponential finding frequency function galaxy gene genetic genome genomic geometry gradient
        gravitational gravity hypothesis inference integral ion isotope kinetic laboratory laser lattice linear
        magnetic mass mathematical matrix mean measurement mechanism membrane method methodology microscope model
        molecular molecule momentum mutation neuron neutron nonlinear nuclear nucleus numerical observation optical
        orbit organism oscillation oxidation oxygen parameter particle peer phase phenomenon photon physics plasma
        polymer polynomial probability proof protein proton quantitative quantum radiation reaction regression
        replicate research researcher result sample sampling scientific scientist sequence simulation species
        spectrum spectroscopy statistical statistically statistics stochastic symmetry synthesis temperature tensor
        theorem theoretical theory thermodynamic variable variance vector velocity voltage wavelength
        """,
}
# Every fifth content word a term of the field; ours. In the passages of the tests it is every second.
FULL_SHARE = 0.2
SUBJECTS = {"medical": "medicine", "legal": "law", "scientific": "science"}


@register_reward("domain")
@dataclass
class Domain(ModelReward[tuple[Classifier, int | None]]):
    """How far a text belongs to a field, by its words or a classifier; 0 to 1.

        lexicon      min(1, s / 0.2), s = share of the content words that are terms of the field; 0 without words
        classifier   the probability of `label`; without one, of the model's label that is called like the field;
                     of a model of inference p(entailment) / (p(entailment) + p(contradiction)) of the text with
                     "This text is about medicine." (law, science)
        rubric       the reward `judge`'s: {"type": "judge", "rubric": ...}

    The words are English. Source of the zero-shot form: Yin et al. 2019, arXiv:1909.00161.
    """

    reads = ("response",)

    name: Literal["medical", "legal", "scientific"]
    method: Literal["lexicon", "classifier", "rubric"] = "lexicon"
    model: str = "roberta-large-mnli"  # of the classifier
    label: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "rubric":
            raise InputError("method 'rubric' is the reward judge's: give {'type': 'judge', 'rubric': ...}")

    def setup(self, device: str | torch.device | None = None) -> None:
        if self.method == "classifier":
            super().setup(device)

    def _load(self, device: torch.device) -> tuple[Classifier, int | None]:
        classifier = shared(load_classifier, self.model, device)
        if self.label is not None:
            return classifier, label_index(classifier.labels, self.label, "label")
        named = [i for i, label in enumerate(classifier.labels) if label.lower() in (self.name, SUBJECTS[self.name])]
        if named:
            return classifier, named[0]
        try:
            rows = nli_rows(classifier.labels)
        except InputError:
            rows = (None,)
        if None in rows:
            raise InputError(f"label must be one of the model's: {', '.join(classifier.labels)}")
        return classifier, None

    def _score(self, responses: list[str], targets: list[Any], prompts: list[str], items: list[Any]) -> Sequence[float]:
        if self.method == "lexicon":
            lexicon = frozenset(LEXICONS[self.name].split())
            return [_share_of_terms(response, lexicon) for response in responses]
        return super()._score(responses, targets, prompts, items)

    def _model_scores(self, loaded: tuple[Classifier, int | None], samples: Samples) -> Sequence[float]:
        classifier, index = loaded
        if index is not None:
            return probability(classifier, samples.responses, index).tolist()
        statement = f"This text is about {SUBJECTS[self.name]}."
        answers = nli_probabilities(classifier, [(response, statement) for response in samples.responses])
        # From logits far apart both may be 0.
        return (answers[:, 0] / (answers[:, 0] + answers[:, 2]).clamp_min(1e-30)).tolist()


def _share_of_terms(text: str, lexicon: frozenset[str]) -> float:
    content = [word for word in words(text) if word not in STOPWORDS]
    hits = sum(word in lexicon or word.removesuffix("s") in lexicon for word in content)
    return min(1.0, hits / len(content) / FULL_SHARE) if content else 0.0
