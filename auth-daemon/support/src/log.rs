//! The `log` section, of all configuration files.

use crate::config::Section;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// Defaults to text.
    pub format: LogFormat,
    /// A tracing filter such as `info` or `auth_daemon=debug`. Defaults to `info`.
    pub level: String,
}

impl Log {
    /// Takes the section out of `root`.
    pub fn read(root: &mut Section, faults: &mut Vec<String>) -> Self {
        let mut log = root.section("log", faults);
        let format = log.parsed("format", faults, |s| match s {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("is neither text nor json"),
        });
        let level = log.parsed("level", faults, |s| {
            tracing_subscriber::EnvFilter::try_new(s).map(|_| s.to_owned())
        });
        log.refuse_the_rest(faults);
        Self {
            format: format.unwrap_or(LogFormat::Text),
            level: level.unwrap_or_else(|| "info".to_owned()),
        }
    }
}
