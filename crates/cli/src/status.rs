//! `raft-sqlite status`

use clap::Args;
use kine_adapter::proto::etcdserverpb::cluster_client::ClusterClient;
use kine_adapter::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use kine_adapter::proto::etcdserverpb::{MemberListRequest, StatusRequest};

use crate::Failure;
use crate::endpoint::{EndpointArguments, refused};
use crate::output::{self, Format};

#[derive(Args)]
pub struct StatusArguments {
    #[command(flatten)]
    endpoints: EndpointArguments,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

const COLUMNS: &[&str] =
    &["ID", "Name", "Address", "Role", "Term", "Leader", "Log index", "Applied index", "Size bytes", "Errors"];

/// Asks every member (not only the endpoints given) how it is.
pub async fn run(arguments: StatusArguments) -> Result<(), Failure> {
    let mut client = ClusterClient::new(arguments.endpoints.connect_any().await?);
    // Not linearizable: it must work without a leader, too.
    let request = MemberListRequest { linearizable: false };
    let members = client.member_list(request).await.map_err(|status| refused(&status))?.into_inner().members;
    let mut rows = Vec::new();
    let mut leader_known = false;
    for member in members {
        let address = member.client_ur_ls.first().cloned().unwrap_or_default();
        let mut row = vec![format!("{:016x}", member.id), member.name.clone(), address.clone()];
        match ask(&arguments.endpoints, &address).await {
            Ok(status) => {
                leader_known |= status.leader != 0;
                let role = match (status.leader == member.id, status.is_learner) {
                    (true, _) => "leader",
                    (_, true) => "learner",
                    _ => "follower",
                };
                row.extend([
                    role.to_owned(),
                    status.raft_term.to_string(),
                    format!("{:016x}", status.leader),
                    status.raft_index.to_string(),
                    status.raft_applied_index.to_string(),
                    status.db_size.to_string(),
                    status.errors.join("; "),
                ]);
            }
            Err(failure) => {
                row.extend(std::iter::repeat_n(String::new(), 6));
                row.push(failure.message);
            }
        }
        rows.push(row);
    }
    output::print(arguments.output, COLUMNS, rows);
    if leader_known { Ok(()) } else { Err(Failure::unreachable("no member knows a leader")) }
}

async fn ask(
    endpoints: &EndpointArguments,
    address: &str,
) -> Result<kine_adapter::proto::etcdserverpb::StatusResponse, Failure> {
    if address.is_empty() {
        return Err(Failure::unreachable("it has told no client address"));
    }
    let mut client = MaintenanceClient::new(endpoints.connect(address).await?);
    Ok(client.status(StatusRequest {}).await.map_err(|status| refused(&status))?.into_inner())
}
