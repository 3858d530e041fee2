//! `raft-sqlite status`

use clap::Args;
use futures_util::future::join_all;
use kine_adapter::proto::etcdserverpb::cluster_client::ClusterClient;
use kine_adapter::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use kine_adapter::proto::etcdserverpb::{MemberListRequest, StatusRequest};
use serde_json::Value;

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
    &["ID", "Name", "Address", "Role", "Term", "Leader", "Committed index", "Applied index", "Size bytes", "Errors"];

/// Asks every member (not only the endpoints given) how it is.
pub async fn run(arguments: StatusArguments) -> Result<(), Failure> {
    let mut client = ClusterClient::new(arguments.endpoints.connect_any().await?);
    // Not linearizable: it must work without a leader, too.
    let request = MemberListRequest { linearizable: false };
    let members = client.member_list(request).await.map_err(|status| refused(&status))?.into_inner().members;
    let mut rows = Vec::new();
    let mut leader_known = false;
    let asked = members.iter().map(|member| ask(&arguments.endpoints, member.client_ur_ls.first()));
    // All at once: one that is gone must not hold up the others.
    for (member, answer) in members.iter().zip(join_all(asked).await) {
        let mut row: Vec<Value> = vec![
            format!("{:016x}", member.id).into(),
            member.name.clone().into(),
            member.client_ur_ls.first().cloned().into(),
        ];
        match answer {
            Ok(status) => {
                leader_known |= status.leader != 0;
                let role = match (status.leader == member.id, status.is_learner) {
                    (true, _) => "leader",
                    (_, true) => "learner",
                    _ => "follower",
                };
                row.extend([
                    role.into(),
                    status.raft_term.into(),
                    (status.leader != 0).then(|| format!("{:016x}", status.leader)).into(),
                    status.raft_index.into(),
                    status.raft_applied_index.into(),
                    status.db_size.into(),
                    status.errors.into(),
                ]);
            }
            Err(failure) => {
                row.push("unreachable".into());
                row.extend(std::iter::repeat_n(Value::Null, 5));
                row.push(vec![failure.message].into());
            }
        }
        rows.push(row);
    }
    output::print(arguments.output, COLUMNS, rows);
    if leader_known {
        Ok(())
    } else {
        Err(Failure::unreachable("no member knows a leader: a majority of the members must run and reach each other"))
    }
}

async fn ask(
    endpoints: &EndpointArguments,
    address: Option<&String>,
) -> Result<kine_adapter::proto::etcdserverpb::StatusResponse, Failure> {
    let address = address.ok_or_else(|| Failure::unreachable("it has not told its client address yet"))?;
    let mut client = MaintenanceClient::new(endpoints.connect(address).await?);
    Ok(client.status(StatusRequest {}).await.map_err(|status| refused(&status))?.into_inner())
}
