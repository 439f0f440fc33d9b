"""The stage that finds one participant's networks in an image, with a template or an atlas."""

from __future__ import annotations

from typing import Literal, TypedDict

from autospec.ica.subject import SubjectFiles, SubjectSettings, build_subject, build_timecourses


class NetworksSettings(TypedDict):
    """What the stage reads from the configuration."""

    subject: str
    stand_in: bool
    """Whether the template is the stand-in, which is no file."""
    ica: SubjectSettings
    """Without ``on_bad_subject``."""


class NetworksFiles(SubjectFiles):
    """The participant's files, and the template or the atlas."""

    template: str | None
    atlas: str | None


def build_networks(
    settings: NetworksSettings,
    files: NetworksFiles,
    on_bad_subject: Literal["fail", "exclude"],
    output: str,
    device: str = "auto",
) -> str:
    """Find a participant's networks and write their folder.

    Parameters
    ----------
    settings : NetworksSettings
    files : NetworksFiles
        None where there is no such file.
    on_bad_subject : {"fail", "exclude"}
        Whether to stop at files that cannot be used, or to write that down as the reason of an exclusion.
    output : str
        The folder; it appears whole or not at all.
    device : str
        Where components are computed: "auto" takes CUDA where there is one, else the processor; or "cpu" or "cuda".

    Returns
    -------
    str
        One line that says what was found.

    Raises
    ------
    UserError
        If the settings or the template cannot be used; and, unless bad subjects are excluded, if the participant's
        files cannot.
    """
    subject = settings["subject"]
    chosen: SubjectSettings = {**settings["ica"], "on_bad_subject": on_bad_subject}
    own: SubjectFiles = {
        "bold": files["bold"],
        "sidecar": files["sidecar"],
        "confounds": files["confounds"],
        "description": files["description"],
        "mask": files["mask"],
    }
    if files["atlas"] is not None:
        return build_timecourses(chosen, subject, own, files["atlas"], None, output)
    template = "stand-in" if settings["stand_in"] else str(files["template"])
    return build_subject(chosen, subject, own, template, output, device)
