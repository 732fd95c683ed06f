//! PeerAuthentication: <https://istio.io/latest/docs/reference/config/security/peer_authentication/>.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    Selector,
    pattern::port,
    read::{Fault, Node, quoted},
};
use crate::ObjectName;

/// Whether callers of the workloads that it selects need mutual TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Its name. The namespace is its scope; the root namespace is the whole mesh.
    pub name: ObjectName,
    /// `metadata.creationTimestamp`: of two in one scope the older counts. What has none is older.
    pub created: Option<String>,
    /// The workloads of the namespace that it is for.
    pub selector: Selector,
    /// For all ports; none is that of the scope around it.
    pub mode: Option<Mode>,
    /// For single ports, before [`PeerAuthentication::mode`].
    pub ports: BTreeMap<u16, Mode>,
    /// What is not as its author may think, each with its field.
    pub warnings: Vec<String>,
}

/// What a port takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// Mutual TLS alone.
    Strict,
    /// Mutual TLS and plaintext.
    Permissive,
    /// As [`Mode::Permissive`]: callers of the mesh use mutual TLS whether it is asked for or not.
    Disable,
}

impl PeerAuthentication {
    pub(super) fn read(document: &Value, name: ObjectName) -> Result<Self, Fault> {
        let spec = Node::top(document, "spec");
        spec.only(&["selector", "mtls", "portLevelMtls"])?;
        let selector = Selector::read(&spec.field("selector"))?;
        let mut warnings = Vec::new();
        let mode = mode(&spec.field("mtls"), &mut warnings)?;
        let mut ports = BTreeMap::new();
        let port_level = spec.field("portLevelMtls");
        for (number, node) in port_level.entries()? {
            let number = port(number).map_err(|reason| node.fault(reason))?;
            // UNSET is the mode of all ports.
            if let Some(mode) = self::mode(&node, &mut warnings)? {
                ports.insert(number, mode);
            }
        }
        if port_level.entries()?.next().is_some() && selector.is_empty() {
            return Err(port_level.fault("needs a selector with labels"));
        }
        Ok(Self {
            created: created(&Node::top(document, "metadata"))?,
            name,
            selector,
            mode,
            ports,
            warnings,
        })
    }
}

fn mode(mtls: &Node<'_>, warnings: &mut Vec<String>) -> Result<Option<Mode>, Fault> {
    mtls.only(&["mode"])?;
    let node = mtls.field("mode");
    Ok(match node.text()? {
        None | Some("UNSET") => None,
        Some("STRICT") => Some(Mode::Strict),
        Some("PERMISSIVE") => Some(Mode::Permissive),
        Some("DISABLE") => {
            warnings.push(format!(
                "{}: DISABLE is as PERMISSIVE here: pods of the mesh still call with mutual TLS",
                node.path()
            ));
            Some(Mode::Disable)
        }
        Some(other) => {
            return Err(node.fault(format!(
                "{} is none of STRICT, PERMISSIVE, DISABLE, UNSET",
                quoted(other)
            )));
        }
    })
}

/// The API server writes `2026-01-02T03:04:05Z`, which sorts as text.
fn created(metadata: &Node<'_>) -> Result<Option<String>, Fault> {
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
        Err(node.fault(format!(
            "{} is not a time as 2026-01-02T03:04:05Z",
            quoted(text)
        )))
    }
}

impl Mode {
    /// As the API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Strict => "STRICT",
            Self::Permissive => "PERMISSIVE",
            Self::Disable => "DISABLE",
        }
    }

    /// Whether a caller without mutual TLS is taken.
    pub fn takes_plaintext(self) -> bool {
        self != Self::Strict
    }
}
