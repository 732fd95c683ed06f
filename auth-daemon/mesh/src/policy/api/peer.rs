//! PeerAuthentication: <https://istio.io/latest/docs/reference/config/security/peer_authentication/>.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    FieldWarning, Selector,
    pattern::port,
    read::{FieldError, Node, quoted},
};
use crate::ObjectName;

/// Whether callers of the selected workloads must use mutual TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Name of the policy. Its namespace is its scope; the root namespace stands for the whole mesh.
    pub name: ObjectName,
    /// `metadata.creationTimestamp`. Of two policies in one scope, the older takes precedence. `None` counts as older.
    pub created: Option<String>,
    /// Workloads in scope that the policy applies to.
    pub selector: Selector,
    /// Mode of all ports. `None` inherits the mode of the enclosing scope.
    pub mode: Option<Mode>,
    /// Modes of single ports, which take precedence over [`PeerAuthentication::mode`].
    pub ports: BTreeMap<u16, Mode>,
    /// Settings that do not have the effect that the author may expect.
    pub warnings: Vec<FieldWarning>,
    /// Why a later version cannot be read, in whose place this one stays in force.
    pub rejected: Option<FieldWarning>,
}

/// Mutual TLS mode: which connections a port accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// Mutual TLS only.
    Strict,
    /// Mutual TLS and plaintext.
    Permissive,
    /// Same as [`Mode::Permissive`]: callers in the mesh use mutual TLS in any case.
    Disable,
}

impl PeerAuthentication {
    pub(super) fn read(document: &Value, name: ObjectName) -> Result<Self, FieldError> {
        let spec = Node::top(document, "spec");
        spec.only(&["selector", "mtls", "portLevelMtls"])?;
        let selector = Selector::read(&spec.field("selector"))?;
        let mut warnings = Vec::new();
        let mode = mode(&spec.field("mtls"), &mut warnings)?;
        let mut ports = BTreeMap::new();
        let port_level = spec.field("portLevelMtls");
        for (number, node) in port_level.entries()? {
            let number = port(number).map_err(|reason| node.error(reason))?;
            // UNSET means that the mode of all ports applies.
            if let Some(mode) = self::mode(&node, &mut warnings)? {
                ports.insert(number, mode);
            }
        }
        if port_level.entries()?.next().is_some() && selector.is_empty() {
            return Err(port_level.error("needs a selector with labels"));
        }
        Ok(Self {
            created: created(&Node::top(document, "metadata"))?,
            name,
            selector,
            mode,
            ports,
            warnings,
            rejected: None,
        })
    }
}

fn mode(mtls: &Node<'_>, warnings: &mut Vec<FieldWarning>) -> Result<Option<Mode>, FieldError> {
    mtls.only(&["mode"])?;
    let node = mtls.field("mode");
    Ok(match node.text()? {
        None | Some("UNSET") => None,
        Some("STRICT") => Some(Mode::Strict),
        Some("PERMISSIVE") => Some(Mode::Permissive),
        Some("DISABLE") => {
            warnings.push(node.warning(
                "DISABLE means PERMISSIVE here: pods of the mesh still call with mutual TLS",
            ));
            Some(Mode::Disable)
        }
        Some(other) => {
            return Err(node.error(format!(
                "{} is none of STRICT, PERMISSIVE, DISABLE, UNSET",
                quoted(other)
            )));
        }
    })
}

/// Parses the creation time. The API server writes `2026-01-02T03:04:05Z`, which sorts as text.
fn created(metadata: &Node<'_>) -> Result<Option<String>, FieldError> {
    const FORM: &[u8] = b"0000-00-00T00:00:00Z";
    let node = metadata.field("creationTimestamp");
    let Some(text) = node.text()? else {
        return Ok(None);
    };
    let written = text.len() == FORM.len()
        && text.bytes().zip(FORM).all(|(b, form)| match form {
            b'0' => b.is_ascii_digit(),
            other => b == *other,
        });
    if written {
        Ok(Some(text.to_owned()))
    } else {
        Err(node.error(format!(
            "{} is not a time as 2026-01-02T03:04:05Z",
            quoted(text)
        )))
    }
}

impl Mode {
    /// Returns the mode's name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Strict => "STRICT",
            Self::Permissive => "PERMISSIVE",
            Self::Disable => "DISABLE",
        }
    }

    /// Reports whether callers without mutual TLS are accepted.
    pub fn takes_plaintext(self) -> bool {
        self != Self::Strict
    }
}
