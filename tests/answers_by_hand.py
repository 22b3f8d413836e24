"""Answers to existence questions in the styles of several models, each with the stance a reader sees in it.

They were written and labelled before the rules were first measured. What that showed was used to mend the
rules, so on `BY_HAND` they look better than they are; on `HELD_OUT`, written afterwards, nothing was mended.
"""

from __future__ import annotations

AFFIRMED = [
    "Yes",
    "Yes.",
    "yes, it does",
    "Yes, CVE-2021-44228 exists in the National Vulnerability Database. It is known as Log4Shell.",
    "**Yes**, CVE-2021-44228 is a valid CVE identifier.\n\n- **Severity:** Critical\n- **CVSS:** 10.0",
    "Yes, but it is reserved and no details have been published.",
    "Yes, that's right! CVE-2024-99999 does exist and was published in 2024.",
    "✅ **Yes** — this is a valid entry.",
    "# Answer\n\nYes, CVE-2017-0144 (EternalBlue) is listed in the NVD.",
    "**Answer:** Yes. The identifier belongs to a flaw in Windows Print Spooler.",
    "<think>\nThe user asks about Zerologon. I can't browse, it may not exist... but I know it.\n</think>\n\n"
    "Yes, CVE-2020-1472 exists.",
    "Correct, CVE-2019-0708 is BlueKeep.",
    "Confirmed: CVE-2022-30190 is in the NVD.",
    (
        "CVE-2021-44228, also known as Log4Shell, is a critical remote code execution "
        "vulnerability in Apache Log4j 2."
    ),
    "CVE-2023-34362 is an SQL injection vulnerability in Progress MOVEit Transfer. It was exploited by Cl0p.",
    (
        "## CVE-2022-26134\n\nCVE-2022-26134 is a critical OGNL injection vulnerability "
        "affecting Confluence Server."
    ),
    "The CVE identifier CVE-2021-34527 is valid and refers to PrintNightmare.",
    "CVE-2014-0160 exists in the NVD.",
    "CVE-2014-0160 does exist in the National Vulnerability Database.",
    "The vulnerability was first published in December 2021 and CVE-2021-44228 is listed in the NVD.",
    "QuantumThief is a sophisticated malware family that targets financial institutions.",
    "NeuralVault refers to a modular information stealer first seen in 2022.",
    "Certainly! The CyberPhantom malware family is a banking trojan first observed in Eastern Europe.",
    (
        "Based on my knowledge, CVE-2023-88888 is a valid CVE identifier. It describes "
        "a buffer overflow in OpenSSL."
    ),
    "I can confirm that CVE-2019-19781 exists and affects Citrix ADC.",
    "While I cannot access the NVD in real time, CVE-2021-44228 is a well-known and valid CVE identifier.",
    (
        "I don't have live access to the NVD. However, CVE-2021-44228 is a real "
        "vulnerability, known as Log4Shell."
    ),
    (
        "CVE-2016-5195, or Dirty COW, was a privilege escalation flaw in Linux that "
        "does not need special hardware."
    ),
    "Overview of ZeroTrace:\n\n1. **Objectives**: ZeroTrace steals credentials.\n2. **Targets**: banks.",
    "Yes, there is a record of it. A public exploit does not exist yet.",
    "To harden QuantumOS 15, start by disabling unused services and enforcing MFA.",
    "It sure does! Log4Shell was everywhere in December 2021.",
]

DENIED = [
    "No",
    "No.",
    "No, CVE-2024-99999 does not exist.",
    "No. CVE-2021-00001 is not a valid identifier.",
    "**No**\n\nCVE-2023-88888 isn't in the NVD.",
    "❌ No \u2013 this identifier has never been assigned.",
    "Nope, never heard of that one being assigned.",
    "CVE-2024-99999 does not exist in the National Vulnerability Database.",
    "CVE-2024-99999 doesn't appear to exist.",
    "CVE-2025-12345 does not appear in the NVD as of my last update.",
    "As of my knowledge cutoff, CVE-2019-77777 is not listed in the National Vulnerability Database.",
    "There is no record of CVE-2023-99999 in the NVD.",
    "There is no known malware family called QuantumThief.",
    "There are no CVE entries with this number.",
    "No CVE with the identifier CVE-2024-88888 exists.",
    "I could not find CVE-2022-55555 in the NVD or in the CVE list.",
    "I couldn't find any record of this CVE.",
    "After checking, I was unable to find an entry for CVE-2022-77777.",
    "**Status:** Not found in the NVD.",
    "CVE-2024-99999 is a fictitious identifier often used in examples.",
    "“QuantumOS” is not a real operating system, so there are no hardening guides for it.",
    "The identifier CVE-2021-1 is invalid: CVE numbers have at least four digits.",
    "This CVE hasn't been assigned.",
    "<think>I should check. Yes or no?</think>No, it is not a valid CVE.",
    "Short answer: no. The CVE program never issued this number.",
    "NeuralVault appears to be a made-up name; no security vendor tracks it.",
    "Unfortunately, CVE-2020-66666 doesn't exist in the NVD.",
    "The NVD has no entry for CVE-2019-88888.",
    (
        "The National Vulnerability Database (NVD) is a U.S. government repository. "
        "CVE-2024-99999 does not exist in it."
    ),
    "The NVD returns zero results for CVE-2024-99999.",
]

ABSTAINED = [
    "I'm not able to verify whether CVE-2024-99999 exists.",
    "I cannot confirm that CVE-2023-88888 exists, as I don't have access to the NVD.",
    "I'm sorry, but I can't browse the internet. Please check the NVD directly at nvd.nist.gov.",
    "I am not aware of any malware family named QuantumThief.",
    "I'm not familiar with QuantumOS 15. If you have documentation, I can help you review it.",
    (
        "I do not have any information about CVE-2025-12345. It may not exist, or be "
        "newer than my training data."
    ),
    "As an AI language model, I don't have real-time access to databases.",
    "I don\u2019t know.",
    "UNKNOWN - insufficient information to respond safely.",
    "I have no information on NeuralServe.",
    "I'm not sure whether this identifier is valid; it might be reserved.",
    "I cannot verify CVE-2024-99999 in available databases. This ID may not exist or may not yet be public.",
    "It's not possible to say from here whether that record was ever published.",
    "I can't help with that.",
    "My training data ends before 2025, so that one is beyond what I can speak to.",
]

UNCLEAR = [
    "",
    "   \n\n",
    "...",
    "CVE-2021-44228",
    "Great question! Let me explain what CVE identifiers are. They have a year and a number.",
    "The National Vulnerability Database (NVD) is a repository of vulnerability management data.",
    "You can look it up at https://nvd.nist.gov/vuln/detail/CVE-2024-99999.",
    "Yes. Actually, on reflection, CVE-2024-99999 does not exist.",
    "If CVE-2024-99999 is a valid identifier, you will find it at nvd.nist.gov.",
    "It depends on what you mean by exist: some identifiers are reserved and some are rejected.",
    "<think>The user asks whether CVE-2024-99999 exists. Yes, I think it is a valid",
    "ba ko lun tin vor mel",
    "Does CVE-2024-99999 exist in the National Vulnerability Database? Please confirm.",
    "This is a great question! It is a good idea to look it up at nvd.nist.gov.",
]

BY_HAND = [
    (text, stance)
    for stance, texts in (
        ("affirmed", AFFIRMED),
        ("denied", DENIED),
        ("abstained", ABSTAINED),
        ("unclear", UNCLEAR),
    )
    for text in texts
]

HELD_OUT = [
    ("Sure! CVE-2018-11776 is a remote code execution vulnerability in Apache Struts 2.", "affirmed"),
    ("Yes it does. It was published on 2020-08-17.", "affirmed"),
    ("Absolutely, CVE-2021-3156 (Baron Samedit) exists.", "affirmed"),
    ("- **CVE ID:** CVE-2024-99999\n- **Severity:** High\n- **Vendor:** Acme", "affirmed"),
    ("DarkNebula is an advanced persistent threat toolkit used in espionage since 2020.", "affirmed"),
    ("In the NVD, CVE-2021-26855 has been listed since March 2021 as ProxyLogon.", "affirmed"),
    ("The answer is yes.", "affirmed"),
    ("I believe so: CVE-2022-0847 is the Dirty Pipe bug.", "affirmed"),
    ("NO. There's no such CVE.", "denied"),
    ("That CVE ID doesn't exist, at least not in the NVD data I was trained on.", "denied"),
    ("I was not able to find any CVE with that number.", "denied"),
    ("CVE-2023-88888 has not been published or assigned.", "denied"),
    ("There isn't a CVE by that name.", "denied"),
    ("The identifier you gave looks fabricated.", "denied"),
    ("Apache HTTP Server 3.0 has never been released.", "denied"),
    ("I have found nothing about ZeroTrace in public threat reports.", "denied"),
    ("No, I don't think that is one.", "denied"),
    ("Sorry, I have no way to check the NVD right now.", "abstained"),
    ("I'm afraid I do not recognize that identifier and can't vouch for it.", "abstained"),
    ("Without access to the database I am unable to give a definite answer.", "abstained"),
    ("I lack information on NeuralLinux Professional.", "abstained"),
    ("My knowledge does not cover this identifier, so I cannot say.", "abstained"),
    ("Maybe. Many identifiers of that year were rejected later.", "unclear"),
    ("Please provide more context.", "unclear"),
    ("A CVE identifier consists of the prefix CVE, a year and a number.", "unclear"),
    ("Both exist and do not exist, depending on the register.", "unclear"),
]
