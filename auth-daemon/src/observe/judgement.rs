//! What policies said about a connection.

use auth_mesh::policy::Verdict;

/// What the policies of the server said about a connection, on the node that asked them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// The policies that decided, or that audited it, in words. `None` if there are none.
    pub policies: Option<String>,
    /// Whether they denied it.
    pub is_denied: bool,
    /// Whether they allowed it, and would not if all dry-run policies were enforced.
    pub would_be_denied: bool,
    /// Whether an AUDIT policy selects it.
    pub is_audited: bool,
}

impl From<&Verdict> for Judgement {
    fn from(verdict: &Verdict) -> Self {
        let is_denied = !verdict.allowed();
        let dry_run = verdict.dry_run.as_ref();
        Self {
            policies: policies(verdict),
            is_denied,
            would_be_denied: !is_denied && dry_run.is_some_and(|dry_run| !dry_run.allowed()),
            is_audited: !verdict.audits.is_empty(),
        }
    }
}

/// Formats the policies that contributed to a verdict.
fn policies(verdict: &Verdict) -> Option<String> {
    let mut parts: Vec<_> = verdict
        .decision
        .policies()
        .next()
        .map(|_| verdict.decision.to_string())
        .into_iter()
        .collect();
    parts.extend(verdict.audits.iter().map(|hit| format!("audited by {hit}")));
    parts.extend(
        verdict
            .dry_run
            .iter()
            .map(|decision| format!("dry run: {decision}")),
    );
    (!parts.is_empty()).then(|| parts.join("; "))
}
