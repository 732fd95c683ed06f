//! People, identified by tokens of an OIDC issuer. The configuration says who may act as which service account.

use auth_mesh::TrustDomain;
use serde_json::{Map, Value};

use super::{Attestor, Caller, Credentials, Unattested, oidc::Tokens};
use crate::config::PeopleAttestation;

/// Tolerated difference of the issuer's clock, in seconds. Short, so that a stolen token is worthless soon after it
/// expires.
const LEEWAY: u64 = 30;
/// Maximum length of a person's name in a token, in bytes.
const MAX_NAME: usize = 200;

/// Identifies people by one issuer's tokens.
#[derive(Debug)]
pub struct People {
    config: PeopleAttestation,
    trust_domain: TrustDomain,
    tokens: Tokens,
}

impl People {
    /// Accepts tokens of the issuer of `config`. Fails if the file with the issuer's keys cannot be used.
    pub fn open(config: PeopleAttestation, trust_domain: TrustDomain) -> Result<Self, String> {
        let tokens = Tokens::open(config.issuer.clone(), LEEWAY)
            .map_err(|error| format!("attestation.people.jwksFile: {error}"))?;
        Ok(Self {
            config,
            trust_domain,
            tokens,
        })
    }

    fn caller(&self, claims: &Map<String, Value>) -> Result<Caller, Unattested> {
        let name = self.name(claims)?;
        let groups = &claims.get(&self.config.groups_claim);
        // One group may be a string (RFC 7519 does not define the claim).
        let in_group = |group: &String| match groups {
            Some(Value::Array(groups)) => groups.iter().any(|found| found == group),
            Some(found) => *found == group,
            None => false,
        };
        let accounts = self.config.accounts.iter().filter(|mapped| {
            mapped.names.iter().any(|found| found == name) || mapped.groups.iter().any(in_group)
        });
        let identities = accounts.map(|mapped| {
            let account = &mapped.account;
            self.trust_domain
                .identity(&account.namespace, &account.name)
                .map_err(|error| Unattested(format!("service account {account}: {error}")))
        });
        let person = format!("oidc:{name}");
        Ok(Caller::Person {
            identities: identities.collect::<Result<_, _>>()?,
            counts_for: person.clone(),
            person,
        })
    }

    fn name<'a>(&self, claims: &'a Map<String, Value>) -> Result<&'a str, Unattested> {
        let claim = &self.config.name_claim;
        let refused = |what: &str| Err(Unattested(format!("the token's {claim} {what}")));
        let name = match claims.get(claim) {
            None => return refused("is missing: attestation.people.nameClaim names it"),
            Some(name) => name.as_str().unwrap_or_default(),
        };
        if !(1..=MAX_NAME).contains(&name.len()) || name.chars().any(char::is_control) {
            return refused("is not a name");
        }
        // An address that the issuer has not verified is one that anybody can enter (OpenID Connect Core 1.0 §5.1).
        let verified = claims.get("email_verified");
        if claim == "email" && verified.is_some_and(|verified| *verified != true) {
            return refused("is not verified by its issuer");
        }
        Ok(name)
    }
}

#[tonic::async_trait]
impl Attestor for People {
    async fn attest(&self, credentials: Credentials<'_>) -> Option<Result<Caller, Unattested>> {
        let claims = self.tokens.verify(credentials.bearer?).await?;
        Some(claims.and_then(|claims| self.caller(&claims)))
    }
}

#[cfg(test)]
mod tests {
    use auth_mesh::ObjectName;
    use serde_json::json;

    use super::*;
    use crate::config::{JwksSource, OidcIssuer, PersonAccount};

    fn account(name: &str, names: &[&str], groups: &[&str]) -> PersonAccount {
        let own = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        PersonAccount {
            account: ObjectName {
                namespace: "default".into(),
                name: name.into(),
            },
            names: own(names),
            groups: own(groups),
        }
    }

    fn caller(name_claim: &str, claims: Value) -> Result<(String, Vec<String>), String> {
        let config = PeopleAttestation {
            issuer: OidcIssuer {
                issuer: "https://login.example".into(),
                audience: "mesh".into(),
                source: JwksSource::Url {
                    url: "https://login.example/keys".into(),
                    root_file: None,
                },
            },
            name_claim: name_claim.into(),
            groups_claim: "groups".into(),
            accounts: vec![
                account("support", &[], &["oncall", "support"]),
                account("admin", &["alice@example.com"], &[]),
            ],
        };
        let people = People::open(config, TrustDomain::default()).unwrap();
        let claims = claims.as_object().unwrap();
        match people.caller(claims).map_err(|error| error.0)? {
            Caller::Person {
                person, identities, ..
            } => Ok((person, identities.iter().map(ToString::to_string).collect())),
            caller => panic!("{caller}"),
        }
    }

    #[test]
    fn names_and_groups_lead_to_accounts() {
        let id = |account: &str| format!("spiffe://cluster.local/ns/default/sa/{account}");
        for (claims, accounts) in [
            (json!({"sub": "u1"}), vec![]),
            (
                json!({"sub": "u1", "groups": ["dev", "oncall"]}),
                vec!["support"],
            ),
            (json!({"sub": "u1", "groups": "oncall"}), vec!["support"]),
            // Not a group, and not a part of a name.
            (
                json!({"sub": "u1", "groups": ["on", 5, null, {"oncall": 1}]}),
                vec![],
            ),
            (json!({"sub": "oncall"}), vec![]),
            (json!({"sub": "u1", "email": "alice@example.com"}), vec![]),
            (
                json!({"sub": "alice@example.com", "groups": ["support"]}),
                vec!["support", "admin"],
            ),
        ] {
            let name = format!("oidc:{}", claims["sub"].as_str().unwrap());
            let accounts = accounts.into_iter().map(id).collect();
            assert_eq!(caller("sub", claims), Ok((name, accounts)));
        }
    }

    #[test]
    fn a_person_has_a_verified_name() {
        let alice = json!({"email": "alice@example.com"});
        assert!(caller("email", alice.clone()).is_ok());
        let long = "x".repeat(MAX_NAME + 1);
        for (claims, why) in [
            (json!({}), "email is missing"),
            (json!({"email": 7}), "is not a name"),
            (json!({"email": ""}), "is not a name"),
            (json!({"email": "a\nb"}), "is not a name"),
            (json!({"email": long}), "is not a name"),
            (
                json!({"email": "alice@example.com", "email_verified": false}),
                "is not verified",
            ),
            (
                json!({"email": "alice@example.com", "email_verified": "true"}),
                "is not verified",
            ),
        ] {
            let error = caller("email", claims).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
