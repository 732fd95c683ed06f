//! The service that issues JWT-SVIDs to nodes and pods.

use auth_ca_api::auth::{IssueJwtRequest, IssueJwtResponse, jwt_service_server::JwtService};
use auth_jwt::Audience;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::{CaService, Refused, attribute, peer};
use crate::{
    attest::Caller,
    audit,
    authority::{Authority, IssuedJwt},
    connection::Peer,
    counters::Kind,
    placement::Grant,
};

impl CaService {
    async fn jwt(
        &self,
        peer: &Peer,
        metadata: &MetadataMap,
        request: IssueJwtRequest,
    ) -> Result<String, Refused> {
        let authority = self.authority()?;
        let caller = self.identify(peer, metadata).await?;
        let asked = Some(request.identity).filter(|identity| !identity.is_empty());
        let audience = Audience::try_from(request.audience);
        let audience = audience
            .map_err(|error| Refused::new(Kind::Malformed, error.to_string()).by(&caller))?;
        let issued = self
            .jwt_for(&authority, &caller, asked.as_deref(), &audience)
            .await;
        let (issued, grant) =
            issued.map_err(|refused| attribute(refused, peer, metadata, &caller, asked))?;
        // A process that was stopped meanwhile may have lost the Lease.
        self.authority()?;
        self.counters.issued_jwts.inc();
        audit::issued_jwt(peer.address, &caller, &grant, &audience, issued.expires);
        Ok(issued.token)
    }

    async fn jwt_for(
        &self,
        authority: &Authority,
        caller: &Caller,
        asked: Option<&str>,
        audience: &Audience,
    ) -> Result<(IssuedJwt, Grant), Refused> {
        // A token would not say that a person acts as the account.
        if let Caller::Person { .. } = caller {
            return Err(Refused::new(
                Kind::Denied,
                "the CA issues no JWT-SVIDs to a person: request a certificate",
            ));
        }
        let (grant, _in_progress) = self.grant(caller, asked).await?;
        let issued = authority.issue_jwt(&grant.identity, audience, &grant.node)?;
        Ok((issued, grant))
    }
}

#[tonic::async_trait]
impl JwtService for CaService {
    async fn issue(
        &self,
        request: Request<IssueJwtRequest>,
    ) -> Result<Response<IssueJwtResponse>, Status> {
        let peer = peer(&request)?;
        let (metadata, _, request) = request.into_parts();
        match self.jwt(&peer, &metadata, request).await {
            Ok(token) => Ok(Response::new(IssueJwtResponse { token })),
            Err(refused) => Err(self.refuse(&peer, refused).await),
        }
    }
}
