//! Parses a configuration file. Fields are taken one by one, each error is recorded with its field, and every field
//! that remains is an error too.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Map, Value};

/// All errors in a configuration file.
#[derive(Debug)]
pub struct InvalidConfig {
    file: PathBuf,
    errors: Vec<String>,
}

impl fmt::Display for InvalidConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot be used:", self.file.display())?;
        for error in &self.errors {
            write!(f, "\n  {error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for InvalidConfig {}

/// Reads `file` and parses it with `parse`.
pub fn load<T>(
    file: &Path,
    parse: impl FnOnce(&str) -> Result<T, Vec<String>>,
) -> Result<T, InvalidConfig> {
    let invalid = |errors| InvalidConfig {
        file: file.to_owned(),
        errors,
    };
    let text = fs::read_to_string(file)
        .map_err(|error| invalid(vec![format!("cannot be read: {error}")]))?;
    parse(&text).map_err(invalid)
}

/// A mapping of fields. Each field is removed when it is taken, so that only unknown fields remain.
pub struct Section {
    path: String,
    fields: Map<String, Value>,
}

impl Section {
    /// Parses a whole YAML file.
    pub fn of_yaml(text: &str, errors: &mut Vec<String>) -> Result<Self, Vec<String>> {
        let root: Value =
            serde_saphyr::from_str(text).map_err(|error| vec![format!("is not YAML: {error}")])?;
        Ok(Self::new("", root, errors))
    }

    /// Interprets `value`, whose path in the file is `path`, as a mapping. Adds an error to `errors` if it is not one.
    pub fn new(path: &str, value: Value, errors: &mut Vec<String>) -> Self {
        let fields = match value {
            Value::Object(fields) => fields,
            Value::Null => Map::new(),
            _ => {
                let name = if path.is_empty() { "the file" } else { path };
                errors.push(format!("{name}: is not a mapping of fields"));
                Map::new()
            }
        };
        Self {
            path: path.to_owned(),
            fields,
        }
    }

    fn field(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// Whether the field is present.
    pub fn has(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }

    /// Removes a field without reading it.
    pub fn skip(&mut self, name: &str) {
        self.fields.remove(name);
    }

    /// Takes a nested mapping. Returns an empty one if the field is absent.
    pub fn section(&mut self, name: &str, errors: &mut Vec<String>) -> Self {
        let value = self.fields.remove(name).unwrap_or(Value::Null);
        Self::new(&self.field(name), value, errors)
    }

    /// Takes a string field and parses it. `None` if it is absent or invalid.
    pub fn parsed<T, E: fmt::Display>(
        &mut self,
        name: &str,
        errors: &mut Vec<String>,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let field = self.field(name);
        match self.fields.remove(name)? {
            Value::String(text) => parse(&text)
                .map_err(|error| errors.push(format!("{field}: {text:?}: {error}")))
                .ok(),
            other => {
                errors.push(format!("{field}: {other} is not a string"));
                None
            }
        }
    }

    /// Like [`Section::parsed`], but an absent field is an error.
    pub fn required<T, E: fmt::Display>(
        &mut self,
        name: &str,
        errors: &mut Vec<String>,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        if !self.fields.contains_key(name) {
            errors.push(format!("{}: is missing", self.field(name)));
        }
        self.parsed(name, errors, parse)
    }

    /// Takes a list of strings and parses each. `None` if the field is absent or not a list.
    pub fn list<T, E: fmt::Display>(
        &mut self,
        name: &str,
        errors: &mut Vec<String>,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<Vec<T>> {
        let field = self.field(name);
        let Value::Array(items) = self.fields.remove(name)? else {
            errors.push(format!("{field}: is not a list"));
            return None;
        };
        let mut parsed = Vec::new();
        for (index, item) in items.into_iter().enumerate() {
            match item.as_str().map(&parse) {
                Some(Ok(value)) => parsed.push(value),
                Some(Err(error)) => errors.push(format!("{field}[{index}]: {item}: {error}")),
                None => errors.push(format!("{field}[{index}]: {item} is not a string")),
            }
        }
        Some(parsed)
    }

    /// Takes a list of mappings. The path of each one includes its index.
    pub fn sections(&mut self, name: &str, errors: &mut Vec<String>) -> Vec<Self> {
        let field = self.field(name);
        match self.fields.remove(name) {
            None => Vec::new(),
            Some(Value::Array(items)) => items
                .into_iter()
                .enumerate()
                .map(|(index, item)| Self::new(&format!("{field}[{index}]"), item, errors))
                .collect(),
            Some(_) => {
                errors.push(format!("{field}: is not a list"));
                Vec::new()
            }
        }
    }

    /// Adds an error for each field that was not taken.
    pub fn refuse_the_rest(self, errors: &mut Vec<String>) {
        for name in self.fields.keys() {
            errors.push(format!("{}: there is no such field", self.field(name)));
        }
    }
}

/// Parses an absolute path.
pub fn absolute(path: &str) -> Result<PathBuf, &'static str> {
    let path = PathBuf::from(path);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err("is not an absolute path")
    }
}

/// Parses a duration between `min` and `max`: a whole number with the unit `ms`, `s`, `m` or `h`.
pub fn duration(text: &str, min: Duration, max: Duration) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        _ => return Err("is not a duration such as 500ms, 5s, 10m or 24h".into()),
    };
    let duration = number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(milliseconds))
        .map(Duration::from_millis)
        .ok_or("is not a duration such as 500ms, 5s, 10m or 24h")?;
    if (min..=max).contains(&duration) {
        Ok(duration)
    } else {
        Err(format!("is not between {min:?} and {max:?}"))
    }
}

/// Parses a DNS name or an IP address.
pub fn server_name(name: &str) -> Result<String, &'static str> {
    rustls::pki_types::ServerName::try_from(name)
        .map(|_| name.to_owned())
        .map_err(|_| "is neither a DNS name nor an IP address")
}

/// Parses the name of a Kubernetes node: a DNS subdomain (RFC 1123) of at most 253 bytes.
pub fn node_name(name: &str) -> Result<String, &'static str> {
    let valid = !name.is_empty()
        && name.len() <= 253
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    if valid {
        Ok(name.to_owned())
    } else {
        Err("is not a node name")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let any = |text| duration(text, Duration::ZERO, Duration::MAX);
        assert_eq!(any("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(any("2h"), Ok(Duration::from_secs(7200)));
        for bad in ["", "s", "5", "-5s", "5 s", "1d", "99999999999999999999s"] {
            assert!(any(bad).is_err(), "{bad}");
        }
    }
}
