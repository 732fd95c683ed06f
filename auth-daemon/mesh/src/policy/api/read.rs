//! JSON values with their paths, so that each error names its field.

use serde_json::Value;

use super::FieldWarning;

/// Maximum length of a value that an error quotes, in characters.
const MAX_QUOTED: usize = 64;

/// An error, with the field that it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FieldError {
    pub(super) field: String,
    pub(super) reason: String,
}

/// A value in an object, with its path. An absent value is null, as in Kubernetes.
#[derive(Clone, Debug)]
pub(super) struct Node<'a> {
    path: String,
    value: &'a Value,
}

impl<'a> Node<'a> {
    /// Returns the field `name` of the top-level object.
    pub(super) fn top(object: &'a Value, name: &str) -> Self {
        Self {
            path: name.to_owned(),
            value: object.get(name).unwrap_or(&Value::Null),
        }
    }

    pub(super) fn path(&self) -> &str {
        &self.path
    }

    pub(super) fn value(&self) -> &'a Value {
        self.value
    }

    pub(super) fn is_null(&self) -> bool {
        self.value.is_null()
    }

    pub(super) fn error(&self, reason: impl Into<String>) -> FieldError {
        FieldError {
            field: self.path.clone(),
            reason: reason.into(),
        }
    }

    pub(super) fn warning(&self, text: impl Into<String>) -> FieldWarning {
        FieldWarning {
            field: self.path.clone(),
            text: text.into(),
        }
    }

    /// Returns the field `name`. The field is null if it is absent, or if this value is not an object.
    pub(super) fn field(&self, name: &str) -> Self {
        Self {
            path: format!("{}.{name}", self.path),
            value: self.value.get(name).unwrap_or(&Value::Null),
        }
    }

    /// Rejects a value that is neither null nor an object with only `known` fields. An ignored field might have
    /// narrowed what the object matches.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), FieldError> {
        let fields = match self.value {
            Value::Null => return Ok(()),
            Value::Object(fields) => fields,
            other => return Err(self.error(format!("is {}, not an object", kind(other)))),
        };
        match fields.keys().find(|key| !known.contains(&key.as_str())) {
            Some(unknown) => Err(FieldError {
                field: format!("{}.{}", self.path, shortened(unknown).escape_debug()),
                reason: format!("is not supported; supported are {}", known.join(", ")),
            }),
            None => Ok(()),
        }
    }

    /// Returns the elements of a list. Null is an empty list.
    pub(super) fn list(&self) -> Result<impl Iterator<Item = Self>, FieldError> {
        let elements = match self.value {
            Value::Null => &[],
            Value::Array(elements) => elements.as_slice(),
            other => return Err(self.error(format!("is {}, not a list", kind(other)))),
        };
        Ok(elements.iter().enumerate().map(|(index, value)| Self {
            path: format!("{}[{index}]", self.path),
            value,
        }))
    }

    /// Returns the entries of an object with user-defined keys. Null has no entries.
    pub(super) fn entries(&self) -> Result<impl Iterator<Item = (&'a str, Self)>, FieldError> {
        let fields = match self.value {
            Value::Null => None,
            Value::Object(fields) => Some(fields),
            other => return Err(self.error(format!("is {}, not an object", kind(other)))),
        };
        Ok(fields.into_iter().flatten().map(|(key, value)| {
            let path = format!("{}[{}]", self.path, shortened(key).escape_debug());
            (key.as_str(), Self { path, value })
        }))
    }

    /// Returns a string, or `None` for null.
    pub(super) fn text(&self) -> Result<Option<&'a str>, FieldError> {
        match self.value {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text)),
            other => Err(self.error(format!("is {}, not a string", kind(other)))),
        }
    }

    /// Returns a list of strings, each converted by `parse`.
    pub(super) fn texts<T>(
        &self,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Vec<T>, FieldError> {
        self.list()?
            .map(|element| match element.text()? {
                Some(text) => parse(text).map_err(|reason| element.error(reason)),
                None => Err(element.error("is null, not a string")),
            })
            .collect()
    }
}

/// Quotes the beginning of a text for an error, with control characters escaped.
pub(super) fn quoted(text: &str) -> String {
    format!("{:?}", shortened(text))
}

fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(MAX_QUOTED).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Reports whether `value`, written as JSON, may take more than `limit` bytes. Stops reading at that limit.
pub(super) fn exceeds(value: &Value, limit: usize) -> bool {
    fn spend(value: &Value, left: &mut usize) -> bool {
        let own = match value {
            Value::String(text) => text.len(),
            _ => 0,
        };
        let Some(rest) = left.checked_sub(own + 1) else {
            return false;
        };
        *left = rest;
        match value {
            Value::Array(elements) => elements.iter().all(|element| spend(element, left)),
            Value::Object(fields) => fields.iter().all(|(key, value)| {
                left.checked_sub(key.len()).is_some_and(|rest| {
                    *left = rest;
                    spend(value, left)
                })
            }),
            _ => true,
        }
    }
    let mut left = limit;
    !spend(value, &mut left)
}
