//! The `accessLog` section: which names the fields of connections' lines have, and how many of the lines are written.

use std::str::FromStr;

use auth_support::config::Section;

/// How connections are logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AccessLog {
    /// Defaults to the daemon's own names.
    pub fields: AccessFields,
    /// The fraction of the connections that ended in order that get a line. Defaults to all.
    pub sample: Sample,
}

/// Names of the fields of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessFields {
    /// The daemon's own.
    #[default]
    Daemon,
    /// OpenTelemetry's names for network attributes.
    OpenTelemetry,
}

/// A fraction, from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    per_million: u32,
}

const MILLION: u32 = 1_000_000;

impl AccessLog {
    pub(super) fn read(root: &mut Section, errors: &mut Vec<String>) -> Self {
        let mut section = root.section("accessLog", errors);
        let fields = section.parsed("fields", errors, |s| match s {
            "daemon" => Ok(AccessFields::Daemon),
            "opentelemetry" => Ok(AccessFields::OpenTelemetry),
            _ => Err("is neither daemon nor opentelemetry"),
        });
        let sample = section.parsed("sample", errors, Sample::from_str);
        section.refuse_the_rest(errors);
        Self {
            fields: fields.unwrap_or_default(),
            sample: sample.unwrap_or_default(),
        }
    }
}

impl Sample {
    /// Decides at random whether a connection is in the sample, so that no pod can choose which connections are not.
    pub(crate) fn draw(self) -> bool {
        self.per_million == MILLION || rand::random_ratio(self.per_million, MILLION)
    }
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            per_million: MILLION,
        }
    }
}

impl FromStr for Sample {
    type Err = &'static str;

    /// Parses a percentage, such as `2.5%`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = "is not a percentage from 0% to 100%, such as 10% or 0.5%";
        let number = text.strip_suffix('%').ok_or(error)?;
        let is_decimal = number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let percent: f64 = number.parse().map_err(|_| error)?;
        if !is_decimal || !(0.0..=100.0).contains(&percent) {
            return Err(error);
        }
        Ok(Self {
            per_million: (percent * f64::from(MILLION) / 100.0).round() as u32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_percentages() {
        let per_million = |text: &str| text.parse().map(|sample: Sample| sample.per_million);
        assert_eq!(per_million("10%"), Ok(100_000));
        assert_eq!(per_million("0.5%"), Ok(5_000));
        assert_eq!(per_million("0%"), Ok(0));
        assert_eq!(per_million("100%"), Ok(MILLION));
        for bad in [
            "", "%", "10", "-1%", "+1%", "101%", "1e1%", "NaN%", "inf%", "1.2.3%",
        ] {
            assert!(per_million(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn about_a_tenth_of_many_is_drawn() {
        let sample: Sample = "10%".parse().unwrap();
        let drawn = (0..100_000).filter(|_| sample.draw()).count();
        assert!((9_000..11_000).contains(&drawn), "{drawn}");
        let none: Sample = "0%".parse().unwrap();
        assert!(!(0..1000).any(|_| none.draw()));
        assert!((0..1000).all(|_| Sample::default().draw()));
    }
}
