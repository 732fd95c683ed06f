//! Label selectors.

use std::{collections::BTreeMap, fmt};

use super::read::{FieldError, Node, quoted};

/// A label selector, which matches the workloads in its scope that have all of these labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(BTreeMap<String, String>);

impl Selector {
    /// Returns a selector of the workloads that have all of `labels`. They need not be labels that Kubernetes accepts.
    pub fn of(labels: BTreeMap<String, String>) -> Self {
        Self(labels)
    }

    pub(super) fn read(node: &Node<'_>) -> Result<Self, FieldError> {
        node.only(&["matchLabels"])?;
        let mut labels = BTreeMap::new();
        for (key, value) in node.field("matchLabels").entries()? {
            if !is_label_key(key) {
                return Err(value.error("is not a label that a pod can have"));
            }
            match value.text()? {
                Some(text) if is_label_value(text) => {
                    labels.insert(key.to_owned(), text.to_owned())
                }
                Some(text) => {
                    let reason = format!("{} is not a value that a label can have", quoted(text));
                    return Err(value.error(reason));
                }
                None => return Err(value.error("is null, not a string")),
            };
        }
        Ok(Self(labels))
    }

    /// Reports whether the selector matches a workload with `labels`.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
    }

    /// Returns the required labels.
    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    /// Reports whether the selector matches all workloads in its scope.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (key, value)) in self.0.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(f, "{comma}{key}={value}")?;
        }
        Ok(())
    }
}

fn is_label_key(key: &str) -> bool {
    !key.is_empty()
        && key.len() <= 253 + 1 + 63
        && key
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/'))
}

fn is_label_value(value: &str) -> bool {
    value.len() <= 63
        && value
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}
