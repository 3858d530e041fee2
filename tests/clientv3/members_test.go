package clientv3

import (
	"strconv"
	"strings"
	"testing"
)

func TestStatus(t *testing.T) {
	throughOneEndpoint(t, func(t *testing.T, s *session) {
		written := s.put(t, "k", "v")
		leaders := map[uint64]bool{}
		members := map[uint64]bool{}
		for i, endpoint := range endpoints(t) {
			// A read through the node makes sure that it has applied the write.
			if _, err := s.all[i].Get(s.ctx, s.key("k")); err != nil {
				t.Fatal(err)
			}
			status, err := s.all[i].Status(s.ctx, endpoint)
			if err != nil {
				t.Fatal(err)
			}
			if status.Header.ClusterId == 0 || status.Header.MemberId == 0 || status.Header.Revision < written || status.Header.RaftTerm != status.RaftTerm {
				t.Errorf("%s: header %v", endpoint, status.Header)
			}
			if status.RaftTerm == 0 || status.RaftIndex == 0 || status.RaftAppliedIndex == 0 || status.RaftAppliedIndex > status.RaftIndex {
				t.Errorf("%s: term %d, index %d, applied %d", endpoint, status.RaftTerm, status.RaftIndex, status.RaftAppliedIndex)
			}
			if status.DbSize <= 0 || status.DbSizeInUse <= 0 || status.DbSizeInUse > status.DbSize {
				t.Errorf("%s: size %d, in use %d", endpoint, status.DbSize, status.DbSizeInUse)
			}
			if status.IsLearner || len(status.Errors) != 0 {
				t.Errorf("%s: learner %v, errors %v", endpoint, status.IsLearner, status.Errors)
			}
			// kube-apiserver turns consistent reads from its cache off for older ones, and for 3.5.0 to 3.5.12.
			if !atLeast(status.Version, 3, 4, 31) || (atLeast(status.Version, 3, 5, 0) && !atLeast(status.Version, 3, 5, 13)) {
				t.Errorf("%s: version %s is not one that kube-apiserver takes for complete", endpoint, status.Version)
			}
			members[status.Header.MemberId] = true
			leaders[status.Leader] = true
		}
		equal(t, "different members", len(members), len(endpoints(t)))
		if len(leaders) != 1 {
			t.Fatalf("the nodes name different leaders: %v", leaders)
		}
		list, err := s.MemberList(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, member := range list.Members {
			delete(leaders, member.ID)
		}
		if len(leaders) != 0 {
			t.Errorf("the leader is none of the members: %v", leaders)
		}
	})
}

func atLeast(version string, want ...int) bool {
	for i, part := range strings.SplitN(version, ".", 3) {
		number, err := strconv.Atoi(part)
		if err != nil || number < want[i] {
			return false
		}
		if number > want[i] {
			return true
		}
	}
	return true
}

func TestMemberList(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		response, err := s.MemberList(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(response.Members) < len(endpoints(t)) {
			t.Errorf("%d members, but there are %d endpoints", len(response.Members), len(endpoints(t)))
		}
		equal(t, "revision, which cluster requests do not report", response.Header.Revision, 0)
		if response.Header.ClusterId == 0 || response.Header.MemberId == 0 || response.Header.RaftTerm == 0 {
			t.Errorf("header %v", response.Header)
		}
		names := map[string]bool{}
		ids := map[uint64]bool{}
		for _, member := range response.Members {
			if member.ID == 0 || member.Name == "" || len(member.PeerURLs) == 0 || len(member.ClientURLs) == 0 || member.IsLearner {
				t.Errorf("member %v", member)
			}
			names[member.Name] = true
			ids[member.ID] = true
		}
		equal(t, "different names", len(names), len(response.Members))
		for i, endpoint := range endpoints(t) {
			status, err := s.all[i].Status(s.ctx, endpoint)
			if err != nil {
				t.Fatal(err)
			}
			if !ids[status.Header.MemberId] {
				t.Errorf("%s calls itself %x, which is not in the list", endpoint, status.Header.MemberId)
			}
		}
	})
}

func TestAlarmsOfAHealthyCluster(t *testing.T) {
	throughEachEndpoint(t, func(t *testing.T, s *session) {
		response, err := s.AlarmList(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "alarms", len(response.Alarms), 0)
	})
}
