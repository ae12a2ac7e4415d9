"""Reports as information systems export them: line breaks spelled out, lists, headings in one line,
abbreviations of several languages, findings and impression under many headings."""

import contextlib
import io

import pytest

from asap.data.cohorts import own
from asap.text.sentences import clean_text, decode_escapes, split_sentences

TEXTS = [  # text, its sentences
    ("Lungs clear.\\.br\\\\.br\\No effusion.", ["Lungs clear.", "No effusion."]),
    (
        "Lungs clear\\.br\\No effusion\\.br\\Heart normal",
        ["Lungs clear", "No effusion", "Heart normal"],
    ),
    ("Lungs are\\.sp\\clear.\\.in+4\\No effusion.", ["Lungs are clear.", "No effusion."]),
    (
        "Lungs clear.\\X0D\\\\X0A\\No effusion.\\X0D0A\\Heart normal.",
        ["Lungs clear.", "No effusion.", "Heart normal."],
    ),
    (
        "\\H\\FINDINGS\\N\\: Lungs clear.\\.br\\No effusion.",
        ["FINDINGS: Lungs clear.", "No effusion."],
    ),
    ("Nodule 5 mm\\T\\ scar. T 38\\S\\C.", ["Nodule 5 mm& scar.", "T 38^C."]),
    (
        "Lungs clear.\\nNo effusion.\\nHeart normal.",
        ["Lungs clear.", "No effusion.", "Heart normal."],
    ),
    (
        "Lungs clear.\\r\\nNo effusion.\\r\\nHeart normal.",
        ["Lungs clear.", "No effusion.", "Heart normal."],
    ),
    (
        "Lungs clear\\r\\nNo effusion\\r\\nHeart normal",
        ["Lungs clear", "No effusion", "Heart normal"],
    ),
    ("Mass\\nodule in the RUL.", ["Mass\\nodule in the RUL."]),
    (
        "Lungs clear._x000D__x000A_No effusion._x000d_\n_x000d_\nHeart normal.",
        ["Lungs clear.", "No effusion.", "Heart normal."],
    ),
    (
        "Lungs clear.<BR>No effusion.<br />Heart normal.</br>Done.",
        ["Lungs clear.", "No effusion.", "Heart normal.", "Done."],
    ),
    ("<p>Lungs clear.</p><p>No <b>effusion</b>.</p>", ["Lungs clear.", "No effusion."]),
    ("<div>Lungs clear</div><div class='x'>No effusion</div>", ["Lungs clear", "No effusion"]),
    ("<ul><li>Stable nodules</li><li>Small hernia</li></ul>", ["Stable nodules", "Small hernia"]),
    ("Nodule&nbsp;of&nbsp;5&nbsp;mm.&nbsp;No effusion.", ["Nodule of 5 mm.", "No effusion."]),
    (
        "Nodule &lt; 5 mm. SUV &gt;2. Heart &amp; lungs normal.",
        ["Nodule < 5 mm.", "SUV >2.", "Heart & lungs normal."],
    ),
    (
        "Lungs clear.&#13;&#10;No effusion.&#xD;&#xA;Heart normal.",
        ["Lungs clear.", "No effusion.", "Heart normal."],
    ),
    (
        "Lungs clear.&lt;br&gt;No effusion.&lt;br/&gt;Heart normal.",
        ["Lungs clear.", "No effusion.", "Heart normal."],
    ),
    ("Nodule <5 mm. Node <10 mm. p<0.05.", ["Nodule <5 mm.", "Node <10 mm. p<0.05."]),
    (
        "Lungs clear.\u2028No effusion.\x0bHeart normal.",
        ["Lungs clear.", "No effusion.", "Heart normal."],
    ),
    ("Lungs clear.|No effusion.|Heart normal.", ["Lungs clear.", "No effusion.", "Heart normal."]),
    ("Lungs clear.~No effusion.~Heart normal.", ["Lungs clear.", "No effusion.", "Heart normal."]),
    ("Nodule of ~5 mm. Node ~ 8 mm.", ["Nodule of ~5 mm.", "Node ~ 8 mm."]),
    ("#1 Stable nodules\n#2 Small hernia", ["Stable nodules", "Small hernia"]),
    (
        "#1. Stable nodules #2. Small hernia #3. Emphysema",
        ["Stable nodules", "Small hernia", "Emphysema"],
    ),
    ("1) Stable nodules 2) Small hernia", ["Stable nodules", "Small hernia"]),
    ("(1) Stable nodules (2) Small hernia", ["Stable nodules", "Small hernia"]),
    ("I. Stable nodules\nII. Small hernia\nIII. Scar", ["Stable nodules", "Small hernia", "Scar"]),
    ("a. Stable nodules\nb. Small hernia", ["Stable nodules", "Small hernia"]),
    ("A) Stable nodules\nB) Small hernia", ["Stable nodules", "Small hernia"]),
    ("· Stable nodules\n· Small hernia", ["Stable nodules", "Small hernia"]),
    ("+ Stable nodules\n+ Small hernia", ["Stable nodules", "Small hernia"]),
    ("→ Stable nodules\n→ Small hernia", ["Stable nodules", "Small hernia"]),
    ("o  Stable nodules\no  Small hernia\no  Scar", ["Stable nodules", "Small hernia", "Scar"]),
    ("– Stable nodules – Small hernia", ["Stable nodules – Small hernia"]),
    (
        "LUNGS: Clear. PLEURA: No effusion. HEART: Normal.",
        ["LUNGS: Clear.", "PLEURA: No effusion.", "HEART: Normal."],
    ),
    (
        "LUNGS AND AIRWAYS: Clear PLEURA: No effusion",
        ["LUNGS AND AIRWAYS: Clear", "PLEURA: No effusion"],
    ),
    (
        "FINDINGS: LUNGS: Clear PLEURA: No effusion",
        ["FINDINGS: LUNGS: Clear", "PLEURA: No effusion"],
    ),
    (
        "FINDINGS: Nodule in RUL: 5 mm. CT: normal.",
        ["FINDINGS: Nodule in RUL: 5 mm.", "CT: normal."],
    ),
    ("Measured in CT: 5 mm", ["Measured in CT: 5 mm"]),
    ("Nodule in LLL: 5 mm, in RUL: 4 mm.", ["Nodule in LLL: 5 mm, in RUL: 4 mm."]),
    (
        "Heart: Normal Lungs: Clear Pleura: No effusion",
        ["Heart: Normal", "Lungs: Clear", "Pleura: No effusion"],
    ),
    (
        "Z.B. ein Rundherd von ca. 5 mm im re. Oberlappen. Kein Erguss.",
        ["Z.B. ein Rundherd von ca. 5 mm im re. Oberlappen.", "Kein Erguss."],
    ),
    (
        "Rundherd, z. B. Granulom, vgl. Abb. 3 bzw. Bild 4. Kein Erguss.",
        ["Rundherd, z. B. Granulom, vgl. Abb. 3 bzw. Bild 4.", "Kein Erguss."],
    ),
    (
        "V.a. Metastase im re. UL. Verd. auf Pneumonie. Kein Nachw. eines Ergusses.",
        ["V.a. Metastase im re. UL.", "Verd. auf Pneumonie.", "Kein Nachw. eines Ergusses."],
    ),
    (
        "Z.n. OP. Keine Änderung i.Vgl. zur VU. Erguss li. > re. Herz o.B.",
        ["Z.n. OP.", "Keine Änderung i.Vgl. zur VU.", "Erguss li. > re.", "Herz o.B."],
    ),
    (
        "Befund v.a. links. Lunge i.O. Herz normal groß.",
        ["Befund v.a. links.", "Lunge i.O.", "Herz normal groß."],
    ),
    ("Untersuchung vom 03.04.2020. Kein Erguss.", ["Untersuchung vom 03.04.2020.", "Kein Erguss."]),
    (
        "Untersuchung am 3. April 2020. Rundherd im 6. Segment li. und im 10. Segment re. "
        "Kein Erguss.",
        [
            "Untersuchung am 3. April 2020.",
            "Rundherd im 6. Segment li. und im 10. Segment re.",
            "Kein Erguss.",
        ],
    ),
    (
        "Rundherd S. 6 li. dorsal. Gr. 5 mm, d.h. stabil. Sonst o. B.",
        ["Rundherd S. 6 li. dorsal.", "Gr. 5 mm, d.h. stabil.", "Sonst o. B."],
    ),
    (
        "Rundherd (ca. 8 mm, vgl. Voraufn. v. 2019) unverändert. Kontrolle in 3 Mon. empfohlen.",
        [
            "Rundherd (ca. 8 mm, vgl. Voraufn. v. 2019) unverändert.",
            "Kontrolle in 3 Mon. empfohlen.",
        ],
    ),
    (
        "Pat. mit Dyspnoe. Insb. kein Erguss. Evtl. Narbe. Inkl. Oberbauch.",
        ["Pat. mit Dyspnoe.", "Insb. kein Erguss.", "Evtl. Narbe.", "Inkl. Oberbauch."],
    ),
    (
        "Dr. Ahmet Yılmaz. Sağ akciğerde yakl. 5 mm nodül. Örn. granülom.",
        ["Dr. Ahmet Yılmaz.", "Sağ akciğerde yakl. 5 mm nodül.", "Örn. granülom."],
    ),
    (
        "Lezyonlar (kist, nodül vb.) izlenmedi. Bkz. Şekil 3. Plevral efüzyon yok.",
        ["Lezyonlar (kist, nodül vb.) izlenmedi.", "Bkz. Şekil 3.", "Plevral efüzyon yok."],
    ),
    (
        "Sağ alt lobda 4. segmentte nodül. 12.03.2020 tarihli BT ile karşılaştırıldı. "
        "Prof. Dr. Kaya.",
        [
            "Sağ alt lobda 4. segmentte nodül.",
            "12.03.2020 tarihli BT ile karşılaştırıldı.",
            "Prof. Dr. Kaya.",
        ],
    ),
    (
        "Sol üst lobda 3,5 mm. çapında nodül vs. izlendi. Kalp normal.",
        ["Sol üst lobda 3,5 mm. çapında nodül vs. izlendi.", "Kalp normal."],
    ),
    ("Nodule 5 mm.Stable.No effusion.", ["Nodule 5 mm.", "Stable.", "No effusion."]),
    ("Nodule 3x4x5 mm.Unchanged.", ["Nodule 3x4x5 mm.", "Unchanged."]),
    ("Effusion is small.the heart is normal.", ["Effusion is small.", "the heart is normal."]),
    ("Compared to 3.4.2019. No change.", ["Compared to 3.4.2019.", "No change."]),
    ("Compared with 12/03/2019. 3 nodules.", ["Compared with 12/03/2019.", "3 nodules."]),
    ("Compared to 01-02-2020. 2 new nodules.", ["Compared to 01-02-2020.", "2 new nodules."]),
    (
        "Prior CT of 1.2.20 and 3.4.21. 5 mm nodule.",
        ["Prior CT of 1.2.20 and 3.4.21.", "5 mm nodule."],
    ),
    ("Nodule (se. 3, im. 45). Scar (img. 12).", ["Nodule (se. 3, im. 45).", "Scar (img. 12)."]),
    ("Nodule on image 3.45. Stable.", ["Nodule on image 3.45.", "Stable."]),
    (
        "Nodule (series 2, image 34/120), 5 mm. Scar at 10 o'clock.",
        ["Nodule (series 2, image 34/120), 5 mm.", "Scar at 10 o'clock."],
    ),
    (
        "Dose 3.2 mSv. CTDIvol 4.5 mGy. DLP 150 mGy*cm.",
        ["Dose 3.2 mSv.", "CTDIvol 4.5 mGy.", "DLP 150 mGy*cm."],
    ),
    (
        "E.g. a scar, i.e. benign. Cf. CT of 2019. Approx. 5 mm.",
        ["E.g. a scar, i.e. benign.", "Cf. CT of 2019.", "Approx. 5 mm."],
    ),
    (
        "FINDINGS:\\.br\\Lungs clear.\\.br\\IMPRESSION:\\.br\\1. Normal.\\.br\\2. No effusion.",
        ["FINDINGS: Lungs clear.", "IMPRESSION: Normal.", "No effusion."],
    ),
]
REPORTS = [  # the findings say F1, the impression I1
    "IMPRESSION:\nI1 text.\nFINDINGS:\nF1 text.",
    "CLINICAL IMPRESSION: I1 text.\nFINDINGS: F1 text.",
    "FINDINGS: F1 text.\nCLINICAL IMPRESSION: I1 text.",
    "CLINICAL IMPRESSION: pneumonia?\nFINDINGS: F1 text.\nIMPRESSION: I1 text.",
    "CLINICAL IMPRESSION: pneumonia\nFINDINGS: F1 text.\nIMPRESSION: I1 text.",
    "Findings: F1 text. Impression: I1 text.",
    "findings: F1 text. impression: I1 text.",
    "FINDINGS: F1 text. IMPRESSION: I1 text.",
    "FINDINGS F1 text.\nIMPRESSION I1 text.",
    "FINDINGS\nF1 text.\nIMPRESSION\n1. I1 text.",
    "FINDINGS -- F1 text.\nIMPRESSION - I1 text.",
    "Findings\n--------\nF1 text.\n\nImpression\n----------\nI1 text.",
    "**FINDINGS:** F1 text.\n\n**IMPRESSION:** I1 text.",
    "## Findings\nF1 text.\n## Impression\nI1 text.",
    "FINDINGS:\nF1 text.\n\nIMPRESSION/RECOMMENDATION:\nI1 text.",
    "FINDINGS:\nF1 text.\n\nIMPRESSION AND RECOMMENDATIONS:\nI1 text.",
    "FINDINGS:\nF1 text.\n\nCONCLUSION(S):\nI1 text.",
    "FINDINGS:\nF1 text.\n\nFINAL IMPRESSION:\nI1 text.",
    "CT FINDINGS:\nF1 text.\n\nOVERALL IMPRESSION:\nI1 text.",
    "CHEST FINDINGS: F1 text.\nSUMMARY: I1 text.",
    "F1 text.\nSUMMARY\nI1 text.",
    "F1 text.\n\nInterpretation:\nI1 text.",
    "F1 text.\nAssessment: I1 text.",
    "Befund:\nF1 text.\nBeurteilung:\nI1 text.",
    "BEFUND F1 text.\nBEURTEILUNG I1 text.",
    "Befund: F1 text. Zusammenfassung: I1 text.",
    "Klinische Angaben: Husten.\nTechnik: CT.\nBefund: F1 text.\nBeurteilung/Empfehlung: I1 text.",
    "BULGULAR: F1 text.\nSONUÇ: I1 text.",
    "Bulgular\nF1 text.\nSonuç\nI1 text.",
    "Klinik bilgi: öksürük\nTeknik: BT\nBulgular: F1 text.\nİZLENİM: I1 text.",
    "BULGULAR:\nF1 text.\nSONUC:\nI1 text.",
    "RÉSULTATS : F1 text.\nCONCLUSION : I1 text.",
    "INDICATION : toux\nTECHNIQUE : TDM\nRESULTATS: F1 text.\nSYNTHÈSE: I1 text.",
    "HALLAZGOS: F1 text.\nIMPRESIÓN DIAGNÓSTICA: I1 text.",
    "Hallazgos:\nF1 text.\nConclusión:\nI1 text.",
    "BEVINDINGEN: F1 text.\nCONCLUSIE: I1 text.",
    "Verslag:\nF1 text.\nConclusie:\nI1 text.",
    "REPERTI: F1 text.\nCONCLUSIONI: I1 text.",
    "ACHADOS: F1 text.\nIMPRESSÃO: I1 text.\n",
    "OPIS: F1 text.\nWNIOSKI: I1 text.",
    "影像所见：F1 text.\n诊断意见：I1 text.",
    "FINDINGS:\r\nF1 text.\r\n\r\nIMPRESSION:\r\nI1 text.",
    "FINDINGS:\\.br\\F1 text.\\.br\\IMPRESSION:\\.br\\I1 text.",
    "FINDINGS:<br/>F1 text.<br/>IMPRESSION:<br/>I1 text.",
    "FINDINGS:_x000D_\nF1 text._x000D_\nIMPRESSION:_x000D_\nI1 text.",
    "1. FINDINGS: F1 text.\n2. IMPRESSION: I1 text.",
    "EXAM: CT chest.\nHISTORY: cough.\n\nFINDINGS: F1 text.\n\nIMPRESSION:\n1. I1 text.",
    "IMPRESSION: I1 text.\nTECHNIQUE: CT.\nFINDINGS: F1 text.",
    "F1 text.\nOPINION: I1 text.",
    "F1 text. Opinion: I1 text.",
    "RADIOLOGICAL FINDINGS: F1 text. RADIOLOGICAL DIAGNOSIS: I1 text.",
    "Findings:F1 text.Impression:I1 text.",
]


@pytest.mark.parametrize("text, sentences", TEXTS, ids=range(len(TEXTS)))
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


@pytest.mark.parametrize("text", REPORTS, ids=range(len(REPORTS)))
def test_sections(text):
    findings, impression = own.split_report(text)
    assert "F1 text." in findings and "I1" not in findings, findings
    assert "I1 text." in impression and "F1" not in impression, impression


@pytest.mark.parametrize(
    "text",
    [
        "The first impression is that of a nodule.",
        "IMPRESSION OF THE AORTA ON THE ESOPHAGUS.",
        "A summary of findings follows below.",
        "Findings are stable. Opinion of a surgeon advised.",
    ],
)
def test_words_that_are_no_headings(text):
    assert own.split_report(text) == (text, "")


def told_of(text, **options) -> tuple:  # parts, what was said
    own._named.clear()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        parts = own.split_report(text, **options)
    return parts, said.getvalue()


@pytest.mark.parametrize("heading", ["LAUSUNTO", "Συμπέρασμα", "Loppulausunto"])
def test_unknown_headings_are_named_and_can_be_declared(heading):
    text = f"LUNGS: Clear.\n{heading}:\nNormal."
    parts, said = told_of(text)
    assert parts == (text, "") and f"`{heading}`" in said and "LUNGS" not in said
    assert "cohorts.own.headings" in said
    parts, said = told_of(text, headings=dict(impression=[heading.upper()]))
    assert parts == ("LUNGS: Clear.", "Normal.") and not said


def test_sections_before_the_findings_are_left_out_and_later_ones_stay():
    text = "HISTORY: effusion?\nFINDINGS: Clear.\nComparison: none.\nIMPRESSION: Normal."
    assert own.split_report(text) == ("Clear.\nComparison: none.", "Normal.")
    assert own.split_report("TECHNIQUE: CT.\nClear.") == ("TECHNIQUE: CT.\nClear.", "")


@pytest.mark.parametrize(
    "text",
    [
        "Nodule < 5 mm & scar > 3 mm; a/b, 50%, ~4 mm, x_y, R&D",
        "Line one.\nLine two: 3 x 4 mm.",
        "Ergüsse, İzlem, naïve",
        "p<0.05, <b5 and a|b",
        "C:/scans/a\\b",
    ],
)
def test_plain_text_stays(text):
    assert decode_escapes(text) == text


@pytest.mark.parametrize(
    "word", "nan NaN None NULL #N/A #NAME? #VALUE! #REF! n/a N/A - -- <NA>".split()
)
def test_words_for_nothing(word):
    assert clean_text(word) == clean_text(f" {word}\n") == ""
    assert clean_text(f"{word} nodule") != ""
