//! Which apps may use the workload API.

use std::{path::PathBuf, str::FromStr, time::Duration};

use auth_mesh::{Identity, TrustDomain};
use auth_support::config::{Section, absolute, duration};

use super::{MAX_LIFETIME, MIN_LIFETIME};

/// Which apps get a certificate of their own by the SPIFFE Workload API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadApi {
    /// The service accounts of their pods.
    pub accounts: Vec<Accounts>,
    /// Lifetime of the certificates. Defaults to an hour, between 10 seconds and 24 hours. They are not valid for longer than
    /// those of tunnels.
    pub certificate_lifetime: Duration,
    /// A Unix socket of the node at which they reach the API, too. `None` if there is none.
    pub socket: Option<PathBuf>,
}

/// Maximum length of a socket's path in bytes. unix(7) has 107, and the socket has a longer name until it is in place.
const MAX_SOCKET: usize = 100;

impl Default for WorkloadApi {
    /// Allows no account.
    fn default() -> Self {
        Self {
            accounts: Vec::new(),
            certificate_lifetime: Duration::from_secs(60 * 60),
            socket: None,
        }
    }
}

impl WorkloadApi {
    /// Reads the section `workloadApi`.
    pub(super) fn read(root: &mut Section, errors: &mut Vec<String>) -> Self {
        let mut section = root.section("workloadApi", errors);
        let accounts = section.list("accounts", errors, Accounts::from_str);
        let lifetime = section.parsed("certificateLifetime", errors, |text| {
            duration(text, MIN_LIFETIME, MAX_LIFETIME)
        });
        let socket = section.parsed("socket", errors, socket);
        section.refuse_the_rest(errors);
        let defaults = Self::default();
        Self {
            accounts: accounts.unwrap_or_default(),
            certificate_lifetime: lifetime.unwrap_or(defaults.certificate_lifetime),
            socket,
        }
    }

    /// Whether pods of `identity` may use the API.
    pub fn allows(&self, identity: &Identity) -> bool {
        self.accounts.iter().any(|accounts| {
            accounts.namespace == identity.namespace()
                && accounts
                    .account
                    .as_ref()
                    .is_none_or(|account| account == identity.service_account())
        })
    }
}

fn socket(path: &str) -> Result<PathBuf, String> {
    if path.len() > MAX_SOCKET {
        return Err(format!("is longer than {MAX_SOCKET} bytes"));
    }
    // `Path` ignores what ends in a slash or a dot, and the kernel does not.
    let mut parts = path.split('/').skip(1);
    if parts.any(|part| matches!(part, "" | "." | "..")) {
        return Err("names no file, or has a part that is empty, . or ..".into());
    }
    Ok(absolute(path)?)
}

/// A service account, `namespace/account`, or all of a namespace, `namespace/*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accounts {
    namespace: String,
    /// `None`: all accounts.
    account: Option<String>,
}

impl FromStr for Accounts {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const INVALID: &str = "is neither namespace/account nor namespace/*";
        let (namespace, account) = text.split_once('/').ok_or(INVALID)?;
        let account = (account != "*").then_some(account);
        TrustDomain::default()
            .identity(namespace, account.unwrap_or("x"))
            .map_err(|_| INVALID)?;
        Ok(Self {
            namespace: namespace.to_owned(),
            account: account.map(str::to_owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allows_listed_accounts_only() {
        let accounts = ["shop/web", "batch/*"];
        let api = WorkloadApi {
            accounts: accounts.map(|text| text.parse().unwrap()).into(),
            ..WorkloadApi::default()
        };
        let allows = |namespace: &str, account: &str| {
            api.allows(&TrustDomain::default().identity(namespace, account).unwrap())
        };
        assert!(allows("shop", "web") && allows("batch", "any") && allows("batch", "web"));
        assert!(!allows("shop", "other") && !allows("other", "web") && !allows("batch2", "any"));
        assert!(
            !WorkloadApi::default().allows(&TrustDomain::default().identity("a", "b").unwrap())
        );
    }

    #[test]
    fn a_socket_is_a_file_whose_path_the_kernel_takes() {
        assert!(socket("/run/auth-daemon/workload-api/api.sock").is_ok());
        let long = format!("/{}", "x".repeat(MAX_SOCKET));
        for bad in [
            "",
            "api.sock",
            "/",
            "/run/..",
            "/run/api.sock/",
            "/run/api.sock/.",
            "/run//api.sock",
            "/run/./api.sock",
            "/run/../api.sock",
            &long,
        ] {
            assert!(socket(bad).is_err(), "{bad}");
        }
        assert!(socket(&long[..MAX_SOCKET]).is_ok());
    }

    #[test]
    fn rejects_what_is_no_account() {
        for bad in [
            "", "web", "*/web", "*", "shop/", "/web", "shop/w*", "a/b/c", "Shop/web",
        ] {
            assert!(bad.parse::<Accounts>().is_err(), "{bad}");
        }
    }
}
